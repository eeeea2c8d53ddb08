"""Writing packed image sets: many processes decode, the finished directory appears at once or not at all."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from improved_diffusion.data import synthetic
from improved_diffusion.data.containers import Archive, Folder
from improved_diffusion.data.decode import CENTRED, RESIZE_FILTER, Window, decode_image
from improved_diffusion.data.image_set import FORMAT_VERSION, content_sha256, is_image_set
from improved_diffusion.data.labelled_files import TRAINING_SPLITS, LabelledFiles
from improved_diffusion.data.sums import array_sha256
from improved_diffusion.data.synthetic.canvas import SIZE as SYNTHETIC_SIZE
from improved_diffusion.data.workers import fill_rows, render_pool
from improved_diffusion.errors import UserError
from improved_diffusion.files import exclusive

COPY_BYTES = 1 << 26
SYNTHETIC_SHAPE = (SYNTHETIC_SIZE, SYNTHETIC_SIZE, 3)
SYNTHETIC_TEST_START = 1_000_000  # index of the first test image, so that no training set reaches it
SYNTHETIC_VALIDATION_START = 2_000_000
SMALLEST_CROP = 0.7  # of a side
VALIDATION_PER_CLASS = 20  # images for the choice of a checkpoint, where a source has none for that


@dataclass(frozen=True)
class PackedSplit:
    """What was written for one split."""

    path: Path
    split: str
    images_per_class: dict[str, int]
    broken: tuple[tuple[str, str], ...] = ()  # (name in the source, reason) of every image left out

    @property
    def num_images(self) -> int:
        return sum(self.images_per_class.values())


def pack(
    files: LabelledFiles,
    out: str | Path,
    image_size: int | tuple[int, int],
    channels: int = 3,
    *,
    crops: int = 1,
    overwrite: bool = False,
    workers: int | None = None,
) -> list[PackedSplit]:
    """Decode every image of `files` and write the packed set `out`.

    The first split is the set at `out`, every other is a set of its own in the folder `out`/SPLIT. Rows are in the
    order of `files`, whatever the number of `workers` (default: one per usable core). Broken images are left out.

    Args:
        image_size: height and width in pixels: one number, or two.
        channels: 1 (grey), 3 (RGB) or 4 (RGBA); see `decode_image`.
        crops: of each image to train on: the centre, and so many less one at random, by a hash of its name. Images
            that are measured against are cut once.

    Raises `UserError` when `out` is taken (see `check_free`), more than 2% of a split is broken (train and val count as
    one: of a few validation images one would be more), the disk is full, or a worker dies; `out` is then as it was.
    """
    height, width = (image_size, image_size) if isinstance(image_size, int) else image_size
    shape = (height, width, channels)
    render = functools.partial(_decode, files.container, shape)
    details = {"source": files.description, "notes": files.notes, "resize_filter": RESIZE_FILTER, "crops": crops}
    splits = {
        split: [
            (Crop(name, number), label)
            for name, label in items
            for number in range(crops if split in TRAINING_SPLITS else 1)
        ]
        for split, items in files.splits.items()
    }
    with new_directory(Path(out), overwrite) as directory, render_pool(render, workers or usable_cores()) as pool:
        return _write_splits(pool, directory, Path(out), splits, files.class_names, shape, details)


def pack_synthetic(
    out: str | Path,
    per_class: int,
    test_per_class: int,
    seed: int,
    *,
    validation_per_class: int = VALIDATION_PER_CLASS,
    overwrite: bool = False,
    workers: int | None = None,
) -> list[PackedSplit]:
    """Draw the embedded synthetic set and write it as the packed set `out` (train) with `out`/val and `out`/test.

    Training pictures have the indices from 0, the others those from `SYNTHETIC_TEST_START` and
    `SYNTHETIC_VALIDATION_START`; there is no val split of 0 pictures. Raises `UserError` as `pack` does.
    """
    ranges = {
        "train": range(per_class),
        "val": range(SYNTHETIC_VALIDATION_START, SYNTHETIC_VALIDATION_START + validation_per_class),
        "test": range(SYNTHETIC_TEST_START, SYNTHETIC_TEST_START + test_per_class),
    }
    splits = {
        split: [((name, index), label) for label, name in enumerate(synthetic.CLASS_NAMES) for index in indices]
        for split, indices in ranges.items()
        if indices
    }
    render = functools.partial(_draw, seed)
    details = {"source": f"synthetic, seed {seed}"}
    with new_directory(Path(out), overwrite) as directory, render_pool(render, workers or usable_cores()) as pool:
        return _write_splits(pool, directory, Path(out), splits, synthetic.CLASS_NAMES, SYNTHETIC_SHAPE, details)


def usable_cores() -> int:
    """Cores that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def check_free(out: Path, overwrite: bool) -> None:
    """Raise `UserError` when `out` exists and is not an empty folder, unless it is a packed set and `overwrite`; or
    when it is a mount point, which cannot be replaced."""
    try:
        if out.is_mount():
            raise UserError(f"{out} is a mount point: choose a folder in it as --out")
        if not out.exists() or (out.is_dir() and not any(out.iterdir())):
            return
    except OSError as error:
        raise UserError(f"cannot read {out}: {error.strerror}") from error
    if not is_image_set(out):
        raise UserError(f"{out} exists and is not a packed image set: choose another --out, or remove it")
    if not overwrite:
        raise UserError(f"{out} holds a packed image set already: choose another --out, or give --overwrite")


@contextlib.contextmanager
def new_directory(out: Path, overwrite: bool) -> Iterator[Path]:
    """Yield an empty hidden directory beside `out`; when the block ends well, rename it to `out`, else remove it.

    What a killed run left in the hidden directory is cleared by the next. Raises `UserError` when `out` is taken (see
    `check_free`), when another process is writing it, or on an OSError, such as a full disk, inside the block.
    """
    try:
        check_free(out, overwrite)
        target = out.resolve()
        partial = target.with_name(f".{target.name}.partial")
        lock_file = target.with_name(f".{target.name}.partial.lock")
        with exclusive(lock_file, f"another process is writing {partial} at this moment"):
            try:
                shutil.rmtree(partial, ignore_errors=True)
                partial.mkdir()
                yield partial
                _sync(partial)
                _replace(partial, target)
            finally:
                shutil.rmtree(partial, ignore_errors=True)
                lock_file.unlink(missing_ok=True)
    except OSError as error:
        raise UserError(f"could not write {out}: {error.strerror or error}") from error


# ----------------------------------------------------------------------------------------------------------------------
# Content


@dataclass(frozen=True)
class Crop:
    """A part of an image of a source; number 0 is the centre."""

    name: str
    number: int

    def __str__(self) -> str:
        return self.name

    @property
    def window(self) -> Window:
        if self.number == 0:
            return CENTRED
        draw = np.random.default_rng(
            list(hashlib.sha256(f"{self.number} {self.name}".encode("utf-8", "surrogateescape")).digest())
        )
        return Window(draw.uniform(SMALLEST_CROP, 1), draw.uniform(), draw.uniform())


def _decode(files: Folder | Archive, shape: tuple[int, int, int], crop: Crop) -> np.ndarray:
    return decode_image(files.read(crop.name), shape, crop.window)


def _draw(seed: int, key: tuple[str, int]) -> np.ndarray:
    return synthetic.draw(seed, *key)


def _write_splits(
    pool: ProcessPoolExecutor,
    directory: Path,  # to write in
    out: Path,  # where it will be
    splits: dict[str, list[tuple[Any, int]]],  # split -> (key for the pool's render, label) of every image
    class_names: tuple[str, ...],
    shape: tuple[int, int, int],  # (H, W, C) of an image
    details: dict,  # goes to dataset.json as it is
) -> list[PackedSplit]:
    packed = []
    learned_from = sum(len(items) for split, items in splits.items() if split in ("train", "val"))
    for split, items in splits.items():
        place = "" if split == next(iter(splits)) else split
        (directory / place).mkdir(exist_ok=True)
        images_file = directory / place / "images.npy"
        keys, labels = [key for key, _ in items], np.array([label for _, label in items], dtype=np.int64)
        allocate(images_file, (len(items), *shape))
        total = learned_from if split in ("train", "val") else len(items)
        reasons = fill_rows(pool, images_file, keys, f"packing {split}", total)
        if reasons:
            kept = np.delete(np.arange(len(items)), list(reasons))
            if not len(kept):
                row, reason = next(iter(reasons.items()))
                raise UserError(f"no image of {split} can be read; of {keys[row]}: {reason}")
            _keep_rows(images_file, kept)
            labels = labels[kept]
        broken = tuple({str(keys[row]): reason for row, reason in reasons.items()}.items())  # once, of several crops
        counts = _write_description(images_file.parent, labels, class_names, split, details, broken)
        packed.append(PackedSplit(out / place, split, counts, broken))
    return packed


def allocate(file: Path, shape: tuple[int, ...]) -> None:
    """Create the .npy with its disk space reserved: a memory map that runs out of disk kills the process instead."""
    np.lib.format.open_memmap(file, mode="w+", dtype=np.uint8, shape=shape)
    if hasattr(os, "posix_fallocate"):
        with file.open("r+b") as handle:
            os.posix_fallocate(handle.fileno(), 0, file.stat().st_size)


def _keep_rows(images_file: Path, kept: np.ndarray) -> None:
    """Rewrite the array with the rows `kept` (increasing) only."""
    images = np.load(images_file, mmap_mode="r")
    compact_file = images_file.with_name("compact.npy")
    allocate(compact_file, (len(kept), *images.shape[1:]))
    compact = np.load(compact_file, mmap_mode="r+")
    rows = max(1, COPY_BYTES // images[:1].nbytes)
    for start in range(0, len(kept), rows):
        compact[start : start + rows] = images[kept[start : start + rows]]
    compact_file.replace(images_file)


def _write_description(
    directory: Path,
    labels: np.ndarray,
    class_names: tuple[str, ...],
    split: str,
    details: dict,
    broken: tuple[tuple[str, str], ...],
) -> dict[str, int]:
    """Write labels.npy and dataset.json beside a finished images.npy; return the images per class."""
    np.save(directory / "labels.npy", labels)
    images = np.load(directory / "images.npy", mmap_mode="r")
    images_sha256, labels_sha256 = array_sha256(images), array_sha256(labels)
    counts = np.bincount(labels, minlength=len(class_names)).tolist()
    images_per_class = dict(zip(class_names, counts, strict=True))
    height, width, channels = images.shape[1:]
    description = {
        "format_version": FORMAT_VERSION,
        "split": split,
        "num_images": len(images),
        "image_size": height if height == width else [height, width],
        "channels": channels,
        "class_names": class_names,
        "images_per_class": images_per_class,
        **details,
        "broken": [{"image": name, "reason": reason} for name, reason in broken],
        "images_sha256": images_sha256,
        "labels_sha256": labels_sha256,
        "content_sha256": content_sha256(images_sha256, labels_sha256, class_names),
    }
    (directory / "dataset.json").write_text(json.dumps(description, indent=1) + "\n", encoding="utf-8")
    return images_per_class


# ----------------------------------------------------------------------------------------------------------------------
# The directory


def _sync(directory: Path) -> None:
    """Make all files below `directory` durable, so that the rename never comes before the content."""
    for path in [directory, *directory.rglob("*")]:
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def _replace(new: Path, out: Path) -> None:
    """Rename `new` to `out`.

    POSIX cannot rename over a full directory, so a set that was there steps aside first, to `.NAME.old`: the one moment
    at which a kill leaves nothing at `out`, with both sets whole under their hidden names.
    """
    old = out.with_name(f".{out.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if out.exists():
        out.rename(old)
    new.rename(out)
    shutil.rmtree(old, ignore_errors=True)
