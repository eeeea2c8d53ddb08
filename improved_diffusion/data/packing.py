"""Writing packed image sets: many processes decode, the finished directory appears at once or not at all."""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import json
import multiprocessing
import os
import shutil
import signal
import sys
import threading
import warnings
from collections.abc import Iterator
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import UnidentifiedImageError
from tqdm import tqdm

from improved_diffusion.data.decode import RESIZE_FILTER, decode_image
from improved_diffusion.data.image_set import FORMAT_VERSION, array_sha256, content_sha256, is_image_set
from improved_diffusion.data.sources import Archive, Folder, Source
from improved_diffusion.errors import UserError

MAX_BROKEN = 0.02  # fraction of a split; above it the source is taken to be damaged as a whole
CHUNK_IMAGES = 128  # per task: long enough to hide the messages between processes, short enough for an even end
COPY_BYTES = 1 << 26
SYNTHETIC_TEST_START = 1_000_000  # index of the first test image, so that no training set reaches it


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
    source: Source, out: str | Path, image_size: int, *, overwrite: bool = False, workers: int | None = None
) -> list[PackedSplit]:
    """Decode every image of `source` to `image_size` x `image_size` and write the packed set `out`.

    The first split is the set at `out`, every other is a set of its own in the folder `out`/SPLIT. Rows are in the
    order of `source`, whatever the number of `workers` (default: one per usable core). Broken images are left out.

    Raises `UserError` when `out` is taken (see `new_directory`), more than `MAX_BROKEN` of a split is broken, the disk
    is full, or a worker dies; then nothing is left at `out`.
    """
    workers = workers or len(os.sched_getaffinity(0))
    with new_directory(Path(out), overwrite) as directory, _decoders(source.files, image_size, workers) as pool:
        packed = []
        for split, path in _split_paths(source.splits).items():
            items = source.splits[split]
            labels = np.array([label for _, label in items], dtype=np.int64)
            (directory / path).mkdir(exist_ok=True)
            images_file = directory / path / "images.npy"
            _allocate(images_file, (len(items), image_size, image_size, 3))
            reasons = _decode_all(pool, images_file, split, [name for name, _ in items])
            if reasons:
                kept = np.delete(np.arange(len(items)), sorted(reasons))
                _keep_rows(images_file, kept)
                labels = labels[kept]
            broken = tuple((items[row][0], reasons[row]) for row in sorted(reasons))
            details = {
                "source": source.description,
                "notes": source.notes,
                "resize_filter": RESIZE_FILTER,
                "broken": [{"image": name, "reason": reason} for name, reason in broken],
            }
            counts = _write_description(images_file.parent, labels, source.class_names, split, details)
            packed.append(PackedSplit(Path(out) / path, split, counts, broken))
    return packed


def pack_synthetic(
    out: str | Path, per_class: int, test_per_class: int, seed: int, *, overwrite: bool = False
) -> list[PackedSplit]:
    """Draw the embedded synthetic set and write it as the packed set `out` (train) with `out`/test.

    Raises `UserError` when `out` is taken (see `new_directory`) or the disk is full.
    """
    from improved_diffusion.data.synthetic import CLASS_NAMES, draw_set

    class_names = tuple(CLASS_NAMES)
    parts = {"train": (per_class, 0), "test": (test_per_class, SYNTHETIC_TEST_START)}
    packed = []
    with new_directory(Path(out), overwrite) as directory:
        for split, path in _split_paths(parts).items():
            count, first_index = parts[split]
            images, labels = draw_set(seed, count, first_index=first_index)
            (directory / path).mkdir(exist_ok=True)
            np.save(directory / path / "images.npy", images)
            details = {"source": f"synthetic, seed {seed}, {count} per class from index {first_index}"}
            counts = _write_description(directory / path, labels.astype(np.int64), class_names, split, details)
            packed.append(PackedSplit(Path(out) / path, split, counts))
    return packed


@contextlib.contextmanager
def new_directory(out: Path, overwrite: bool) -> Iterator[Path]:
    """Yield an empty hidden directory beside `out`; when the block ends well, rename it to `out`, else remove it.

    What a killed run left in the hidden directory is cleared by the next. Raises `UserError` when `out` exists and is
    not empty, unless it is a packed set and `overwrite`; when another process is writing `out`; or on an OSError, such
    as a full disk, inside the block.
    """
    try:
        _check_free(out, overwrite)
        target = out.resolve()
        partial = target.with_name(f".{target.name}.partial")
        partial.mkdir(parents=True, exist_ok=True)
        with _lock(partial):
            try:
                _clear(partial)
                yield partial
                _sync(partial)
                _replace(partial, target)
            finally:
                shutil.rmtree(partial, ignore_errors=True)
    except OSError as error:
        raise UserError(f"cannot write {out}: {error.strerror or error}") from error


# ----------------------------------------------------------------------------------------------------------------------
# The directory


def _split_paths(splits: dict) -> dict[str, str]:
    """Split -> folder relative to the packed set: "" for the first, its name for every other."""
    return {split: "" if i == 0 else split for i, split in enumerate(splits)}


def _check_free(out: Path, overwrite: bool) -> None:
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return
    if not is_image_set(out):
        raise UserError(f"{out} exists and is not a packed image set: choose another --out, or remove it")
    if not overwrite:
        raise UserError(f"{out} holds a packed image set already: choose another --out, or give --overwrite")


@contextlib.contextmanager
def _lock(directory: Path) -> Iterator[None]:
    """Hold `directory` for this process; the system lets go of it when the process ends, however it ends."""
    handle = os.open(directory, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise UserError(f"another process is writing {directory} at this moment") from error
        yield
    finally:
        os.close(handle)


def _clear(directory: Path) -> None:
    for path in directory.iterdir():
        shutil.rmtree(path) if path.is_dir() else path.unlink()


def _sync(directory: Path) -> None:
    """Make all files below `directory` durable, so that the rename never comes before the content."""
    for path in [directory, *directory.rglob("*")]:
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def _replace(new: Path, out: Path) -> None:
    """Rename `new` to `out`. A full directory cannot be renamed over: the set that was there steps aside first."""
    old = out.with_name(f".{out.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if out.exists():
        out.rename(old)
    new.rename(out)
    shutil.rmtree(old, ignore_errors=True)


def _allocate(file: Path, shape: tuple[int, ...]) -> None:
    """Create the .npy with its disk space reserved: a memory map that runs out of disk kills the process instead."""
    np.lib.format.open_memmap(file, mode="w+", dtype=np.uint8, shape=shape)
    if hasattr(os, "posix_fallocate"):
        with file.open("r+b") as handle:
            os.posix_fallocate(handle.fileno(), 0, file.stat().st_size)


def _keep_rows(images_file: Path, kept: np.ndarray) -> None:
    """Rewrite the array with the rows `kept` (increasing) only."""
    images = np.load(images_file, mmap_mode="r")
    compact_file = images_file.with_name("compact.npy")
    _allocate(compact_file, (len(kept), *images.shape[1:]))
    compact = np.load(compact_file, mmap_mode="r+")
    rows = max(1, COPY_BYTES // images[:1].nbytes)
    for start in range(0, len(kept), rows):
        compact[start : start + rows] = images[kept[start : start + rows]]
    compact_file.replace(images_file)


def _write_description(
    directory: Path, labels: np.ndarray, class_names: tuple[str, ...], split: str, details: dict
) -> dict[str, int]:
    """Write labels.npy and dataset.json beside a finished images.npy; return the images per class."""
    np.save(directory / "labels.npy", labels)
    images = np.load(directory / "images.npy", mmap_mode="r")
    images_sha256, labels_sha256 = array_sha256(images), array_sha256(labels)
    counts = np.bincount(labels, minlength=len(class_names)).tolist()
    images_per_class = dict(zip(class_names, counts, strict=True))
    description = {
        "format_version": FORMAT_VERSION,
        "split": split,
        "num_images": len(images),
        "image_size": images.shape[1],
        "class_names": class_names,
        "images_per_class": images_per_class,
        **details,
        "images_sha256": images_sha256,
        "labels_sha256": labels_sha256,
        "content_sha256": content_sha256(images_sha256, labels_sha256, class_names),
    }
    (directory / "dataset.json").write_text(json.dumps(description, indent=1) + "\n", encoding="utf-8")
    return images_per_class


# ----------------------------------------------------------------------------------------------------------------------
# The processes


@contextlib.contextmanager
def _decoders(files: Folder | Archive, image_size: int, workers: int) -> Iterator[ProcessPoolExecutor]:
    """Processes that decode. They are spawned: forking a process that has threads (PyTorch's, say) can deadlock."""
    context = multiprocessing.get_context("spawn")
    stop = context.RawValue("b", False)
    pool = ProcessPoolExecutor(
        workers, mp_context=context, initializer=_start_worker, initargs=(files, image_size, stop)
    )
    try:
        yield pool
    except BrokenProcessPool as error:
        raise UserError("a worker process died (killed, or out of memory): try again with fewer --workers") from error
    finally:
        stop.value = True  # or a worker would first finish its chunk, which takes long where images are large
        pool.shutdown(cancel_futures=True)


def _decode_all(pool: ProcessPoolExecutor, images_file: Path, split: str, names: list[str]) -> dict[int, str]:
    """Decode `names` into the rows of `images_file`; return row -> reason for those that are broken."""
    futures: dict[Future, int] = {}
    for first in range(0, len(names), CHUNK_IMAGES):
        chunk = names[first : first + CHUNK_IMAGES]
        futures[pool.submit(_decode_chunk, images_file, first, chunk)] = len(chunk)
    broken: dict[int, str] = {}
    interval = 0.1 if sys.stderr.isatty() else 30.0
    with tqdm(total=len(names), desc=f"packing {split}", unit=" images", mininterval=interval) as progress:
        for future in as_completed(futures):
            broken |= future.result()
            progress.update(futures[future])
            if len(broken) > MAX_BROKEN * len(names):
                row = min(broken)
                raise UserError(
                    f"{len(broken)} of the first {progress.n} images (split {split}, {len(names)} in all) are broken, "
                    f"more than {MAX_BROKEN:.0%} of it, so nothing was written: check that the source is complete. "
                    f"For one, {names[row]!r}: {broken[row]}"
                )
    return broken


@dataclass(frozen=True)
class _Worker:
    """What a worker process keeps between chunks."""

    files: Folder | Archive
    image_size: int
    stop: ctypes.c_byte  # shared by all processes, without a lock: a worker killed while it held one would block all


_worker: _Worker


def _start_worker(files: Folder | Archive, image_size: int, stop: ctypes.c_byte) -> None:
    global _worker
    _worker = _Worker(files, image_size, stop)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the parent alone answers it
    warnings.simplefilter("ignore")  # Pillow warns of odd metadata and large images, image after image
    threading.Thread(target=_exit_with_parent, daemon=True).start()


def _exit_with_parent() -> None:
    """A worker whose parent was killed would wait for its next chunk for ever."""
    multiprocessing.parent_process().join()
    os._exit(1)


def _decode_chunk(images_file: Path, first_row: int, names: list[str]) -> dict[int, str]:
    images = np.load(images_file, mmap_mode="r+")
    broken = {}
    for row, name in enumerate(names, first_row):
        if _worker.stop.value:
            break
        try:
            images[row] = decode_image(_worker.files.read(name), _worker.image_size)
        except UnidentifiedImageError:  # its own message is an address in memory
            broken[row] = "not an image of a known format"
        except Exception as error:  # Pillow has no common base class for what a damaged file can raise
            broken[row] = f"{error}" or type(error).__name__
    return broken
