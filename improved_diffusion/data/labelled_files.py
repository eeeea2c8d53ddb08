"""Image files to pack, with their classes: of a folder of class folders, a zip of one, or torchvision's Food101."""

from __future__ import annotations

import dataclasses
import hashlib
import os
import zipfile
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from improved_diffusion.data.containers import Archive, Folder, is_hidden
from improved_diffusion.data.decode import EXTENSIONS
from improved_diffusion.data.image_set import is_image_set
from improved_diffusion.errors import UserError

SPLITS = ("train", "val", "test")
VALIDATION_SHARE = 5  # a validation split takes at most one in five images of a class
LAYOUT = "expected CLASS/IMAGE, or train/CLASS/IMAGE (and val/, test/), or images alone"
NOT_LABELLED = "no class folders: all images are of one class (train with --model.class_conditional false)"
TRAINING_SPLITS = ("train", "all")  # "all" where a source has no splits
UNLABELLED = "unlabelled"  # the one class of images that are in no class folder


@dataclass(frozen=True)
class LabelledFiles:
    """Image files of one or more splits, in a fixed order: by class, then by name."""

    description: str
    container: Folder | Archive
    class_names: tuple[str, ...]  # sorted; one list for all splits
    splits: dict[str, list[tuple[str, int]]]  # split -> (name in `container`, label); in the order of SPLITS
    notes: tuple[str, ...] = ()  # what was left out, one line each


def labelled_folder(path: str | Path) -> LabelledFiles:
    """The images in a folder of class folders or a zip of one.

    The first folders below `path` are the classes, or, when all of them are called train, val or test, splits that hold
    the classes. Deeper folders belong to their class. A single folder that wraps everything is looked through. Where no
    image is in a class folder, all are of one class, which is noted. Hidden files are skipped; files that are no images
    and folders without images are skipped and noted.

    Raises `UserError` when `path` is no such thing.
    """
    path = Path(path)
    container = _open(path)
    try:
        names = [name for name in container.names() if not is_hidden(name)]
    except (zipfile.BadZipFile, OSError, UnicodeError) as error:
        raise UserError(f"cannot read {path}: {error}") from error

    images, strays = [], Counter()
    for name in names:
        extension = os.path.splitext(name)[1].lower()
        if extension in EXTENSIONS:
            images.append(tuple(name.split("/")))
        elif not name.endswith("/"):
            strays[extension or "no extension"] += 1
    if not images:
        raise UserError(f"no images in {path}: {LAYOUT}, an image being one of {' '.join(sorted(EXTENSIONS))}")

    images.sort()
    level = _wrapping_folders(images)
    has_splits = _has_splits(path, images, level)
    class_level = level + has_splits
    is_unlabelled = all(len(parts) == class_level + 1 for parts in images)
    if is_unlabelled:
        images = [(*parts[:-1], UNLABELLED, parts[-1]) for parts in images]
    for parts in images:
        if len(parts) < class_level + 2:
            raise UserError(f"{path}: the image {'/'.join(parts)!r} is not in a class folder; {LAYOUT}")

    class_names = tuple(sorted({parts[class_level] for parts in images}))
    label_of = {name: label for label, name in enumerate(class_names)}
    splits: dict[str, list[tuple[str, int]]] = {split: [] for split in SPLITS} if has_splits else {"all": []}
    for parts in sorted(images, key=lambda parts: parts[class_level]):
        name = "/".join(parts[:-2] + parts[-1:] if is_unlabelled else parts)
        splits[parts[level] if has_splits else "all"].append((name, label_of[parts[class_level]]))
    return LabelledFiles(
        description=str(path.resolve()),
        container=container,
        class_names=class_names,
        splits={split: items for split, items in splits.items() if items},
        notes=_notes(strays, names, class_level, class_names) + (NOT_LABELLED,) * is_unlabelled,
    )


def labelled_food101(root: str | Path, download: bool) -> LabelledFiles:
    """torchvision's Food101 at `root`, with the official splits train (75,750 images) and test (25,250).

    `root` is what torchvision calls so: the folder that holds, or with `download` gets, `food-101/`. Raises `UserError`
    when the data is not there, or cannot be downloaded.
    """
    import torchvision

    root = Path(root)
    if not download and root.name == "food-101" and (root / "meta").is_dir():
        root = root.parent
    splits = {}
    for split in ("train", "test"):
        try:
            # With this loader an item is its path and label: no image is decoded here.
            dataset = torchvision.datasets.Food101(root, split=split, loader=os.fspath, download=download)
        except (OSError, RuntimeError, ValueError, AttributeError) as error:  # missing, no network, bad sum, bad JSON
            if download:
                raise UserError(
                    f"cannot download Food101 to {root}: {error}; "
                    "where it is already unpacked, name the folder that holds food-101/ with --source"
                ) from error
            raise UserError(f"no usable food-101/ (images/, meta/{split}.json) in {root}: {error}") from error
        splits[split] = [dataset[i] for i in range(len(dataset))]
        class_names = tuple(dataset.classes)

    images_folder = root / "food-101" / "images"
    return LabelledFiles(
        description=f"torchvision Food101 at {root.resolve()}",
        container=Folder(images_folder),
        class_names=class_names,
        splits={
            split: sorted((file.removeprefix(f"{images_folder}{os.sep}"), label) for file, label in items)
            for split, items in splits.items()
        },
    )


def with_validation(files: LabelledFiles, per_class: int) -> LabelledFiles:
    """`files` with a validation split of `per_class` images of each class taken out of its training split, or out of
    all its images where it has no splits; of small classes at most a fifth. Those with a val split keep their own.

    Which images is decided by a hash of their file names: the same in every layout, and when others are added, most of
    them stay.
    """
    (first, items), *others = files.splits.items()
    if per_class == 0 or "val" in files.splits or first not in TRAINING_SPLITS:
        return files
    of_class: dict[int, list[str]] = {}
    for name, label in items:
        of_class.setdefault(label, []).append(name)
    taken = {
        name
        for names in of_class.values()
        for name in sorted(names, key=_name_hash)[: min(per_class, len(names) // VALIDATION_SHARE)]
    }
    if not taken:
        note = f"no validation split: no class has {VALIDATION_SHARE} images, of which one could be taken"
        return dataclasses.replace(files, notes=(*files.notes, note))
    note = (
        f"val: {len(taken)} images taken out of train by a hash of their names, {per_class} of each class, or a fifth "
        f"of one that has fewer than {per_class * VALIDATION_SHARE} (--validation-per-class 0 leaves them in)"
    )
    splits = {
        "train": [item for item in items if item[0] not in taken],
        "val": [item for item in items if item[0] in taken],
        **dict(others),
    }
    return dataclasses.replace(files, splits=splits, notes=(*files.notes, note))


def _name_hash(name: str) -> tuple[str, str]:
    file_name = os.path.basename(name)
    return hashlib.sha256(file_name.encode("utf-8", "surrogateescape")).hexdigest(), name


# ----------------------------------------------------------------------------------------------------------------------
# Layout


def _open(path: Path) -> Folder | Archive:
    if path.is_dir():
        if is_image_set(path):
            raise UserError(f"{path} is a packed image set already: open it as it is")
        return Folder(path)
    if path.is_file():
        if not zipfile.is_zipfile(path):
            raise UserError(f"{path} is neither a folder nor a zip archive (or the archive is damaged)")
        return Archive(path)
    raise UserError(f"there is no folder or zip archive at {path}")


def _wrapping_folders(images: list[tuple[str, ...]]) -> int:
    """How many levels hold one folder alone that is neither split nor class: `zip -r food.zip food` makes one."""
    level = 0
    while True:
        tops = {parts[level] for parts in images}
        if len(tops) > 1 or tops <= set(SPLITS) or any(len(parts) <= level + 2 for parts in images):
            return level
        level += 1


def _has_splits(path: Path, images: list[tuple[str, ...]], level: int) -> bool:
    """Whether the folders at `level` are splits. A class may be called "train": it has images right in it."""
    tops = {parts[level] for parts in images}
    if tops <= set(SPLITS):
        return True
    with_images = {parts[level] for parts in images if len(parts) == level + 2}
    splits = sorted(tops & set(SPLITS) - with_images)
    if splits:
        others = sorted(tops - set(SPLITS))
        raise UserError(f"{path} has split folders ({', '.join(splits)}) beside others ({others[0]!r}, ...); {LAYOUT}")
    return False


def _notes(strays: Counter, names: Iterable[str], class_level: int, class_names: tuple[str, ...]) -> tuple[str, ...]:
    notes = []
    if strays:
        kinds = ", ".join(f"{count} {extension}" for extension, count in strays.most_common())
        notes.append(f"skipped {strays.total()} files that are no images: {kinds}")
    folders = {tuple(name[:-1].split("/")) for name in names if name.endswith("/")}
    empty = sorted({parts[class_level] for parts in folders if len(parts) == class_level + 1} - set(class_names))
    if empty:
        notes.append(f"skipped {len(empty)} folders without images: {', '.join(map(repr, empty[:10]))}")
    return tuple(notes)
