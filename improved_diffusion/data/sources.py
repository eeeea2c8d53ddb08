"""Where images come from: a folder of class folders, a zip of one, or torchvision's Food101."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import os
import zipfile
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from improved_diffusion.data.decode import EXTENSIONS
from improved_diffusion.data.image_set import is_image_set
from improved_diffusion.errors import UserError

SPLITS = ("train", "val", "test")
JUNK = {"__MACOSX", "Thumbs.db", "desktop.ini"}  # left by operating systems, as are names with a leading dot
VALIDATION_SHARE = 5  # a validation split takes at most one in five images of a class
LAYOUT = "expected CLASS/IMAGE, or train/CLASS/IMAGE (and val/, test/)"


@dataclass(frozen=True)
class Folder:
    """The files below `root`, each named by its path relative to it, folders joined by '/'."""

    root: Path

    def names(self) -> Iterator[str]:
        """Names of all files, and of all folders with a final '/'."""

        def fail(error: OSError) -> None:
            raise UserError(f"cannot read folder {error.filename}: {error.strerror}")

        for parent, folders, files in os.walk(self.root, onerror=fail, followlinks=True):
            relative = os.path.relpath(parent, self.root)
            prefix = "" if relative == "." else f"{relative}/"
            yield from (f"{prefix}{folder}/" for folder in folders)
            yield from (prefix + file for file in files)

    def read(self, name: str) -> bytes:
        return (self.root / name).read_bytes()


@dataclass(frozen=True)
class Archive:
    """The members of the zip file at `path`."""

    path: Path

    def names(self) -> Iterator[str]:
        """Names of all files, and of the folders that have an entry of their own with a final '/'."""
        yield from self._members

    def read(self, name: str) -> bytes:
        return self._zip.read(self._members[name])

    @functools.cached_property
    def _zip(self) -> zipfile.ZipFile:
        return zipfile.ZipFile(self.path)

    @functools.cached_property
    def _members(self) -> dict[str, zipfile.ZipInfo]:
        return {_member_name(member).removeprefix("./"): member for member in self._zip.infolist()}

    def __reduce__(self) -> tuple:  # an open zip file cannot go to another process, which opens its own
        return Archive, (self.path,)


def _member_name(member: zipfile.ZipInfo) -> str:
    """The member's name. Without the UTF-8 flag, `zipfile` assumes the old code page 437, but most writers that do not
    set the flag (macOS, for one) store UTF-8 all the same."""
    if member.flag_bits & 0x800:
        return member.filename
    try:
        return member.filename.encode("cp437").decode("utf-8")
    except UnicodeError:
        return member.filename


@dataclass(frozen=True)
class Source:
    """Labelled images of one or more splits, in a fixed order: by class, then by name."""

    description: str
    files: Folder | Archive
    class_names: tuple[str, ...]  # sorted; one list for all splits
    splits: dict[str, list[tuple[str, int]]]  # split -> (name in `files`, label); in the order of SPLITS
    notes: tuple[str, ...] = ()  # what was left out, one line each


def folder_source(path: str | Path) -> Source:
    """The images in a folder of class folders or a zip of one.

    The first folders below `path` are the classes, or, when all of them are called train, val or test, splits that hold
    the classes. Deeper folders belong to their class. A single folder that wraps everything is looked through. Hidden
    files are skipped; files that are no images and folders without images are skipped and noted.

    Raises `UserError` when `path` is no such thing.
    """
    path = Path(path)
    files = _open(path)
    try:
        names = [name for name in files.names() if not is_hidden(name)]
    except (zipfile.BadZipFile, OSError) as error:
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
    for parts in images:
        if len(parts) < class_level + 2:
            raise UserError(f"{path}: the image {'/'.join(parts)!r} is not in a class folder; {LAYOUT}")

    class_names = tuple(sorted({parts[class_level] for parts in images}))
    label_of = {name: label for label, name in enumerate(class_names)}
    splits: dict[str, list[tuple[str, int]]] = {split: [] for split in SPLITS} if has_splits else {"all": []}
    for parts in sorted(images, key=lambda parts: parts[class_level]):
        splits[parts[level] if has_splits else "all"].append(("/".join(parts), label_of[parts[class_level]]))
    return Source(
        description=str(path.resolve()),
        files=files,
        class_names=class_names,
        splits={split: items for split, items in splits.items() if items},
        notes=_notes(strays, names, class_level, class_names),
    )


def food101_source(root: str | Path, download: bool) -> Source:
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
    return Source(
        description=f"torchvision Food101 at {root.resolve()}",
        files=Folder(images_folder),
        class_names=class_names,
        splits={
            split: sorted((file.removeprefix(f"{images_folder}{os.sep}"), label) for file, label in items)
            for split, items in splits.items()
        },
    )


def with_validation(source: Source, per_class: int) -> Source:
    """`source` with a validation split of `per_class` images of each class taken out of its training split, or out of
    all its images where it has no splits; of small classes at most a fifth. A source with a val split keeps its own.

    Which images is decided by a hash of their file names: the same in every layout, and when others are added, most of
    them stay.
    """
    (first, items), *others = source.splits.items()
    if per_class == 0 or "val" in source.splits or first not in ("train", "all"):
        return source
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
        return dataclasses.replace(source, notes=(*source.notes, note))
    note = (
        f"val: {len(taken)} images taken out of train by a hash of their names, {per_class} of each class, or a fifth "
        f"of one that has fewer than {per_class * VALIDATION_SHARE} (--validation-per-class 0 leaves them in)"
    )
    splits = {
        "train": [item for item in items if item[0] not in taken],
        "val": [item for item in items if item[0] in taken],
        **dict(others),
    }
    return dataclasses.replace(source, splits=splits, notes=(*source.notes, note))


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


def is_hidden(name: str) -> bool:
    return any(part.startswith(".") or part in JUNK for part in name.split("/"))


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
