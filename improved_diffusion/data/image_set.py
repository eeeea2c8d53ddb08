"""Opening and verifying a packed image set."""

from __future__ import annotations

import hashlib
import json
import zipfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from improved_diffusion.data.sums import array_sha256, file_array_sha256
from improved_diffusion.errors import UserError

FORMAT_VERSION = 1
CHANNELS = (1, 3, 4)  # grey, RGB, RGBA
REPACK = "Pack the set again with `python -m improved_diffusion.data`."


@dataclass(frozen=True, eq=False)
class ImageSet:
    """N images of one size, grey, RGB or RGBA, with their classes."""

    images: np.ndarray  # (N, H, W, C) uint8, C 1, 3 or 4; memory-mapped and read-only when opened from disk
    labels: np.ndarray  # (N,) int64, indices into class_names
    class_names: tuple[str, ...]  # sorted; the same for all splits of one source
    path: Path
    split: str  # "train", "val", "test", or "all" where the source had no splits
    content_hash: str  # SHA-256 hex of images, labels and class names: equal for equal sets, wherever they lie
    images_sha256: str | None = None  # SHA-256 hex of the images alone, where it is known

    def __len__(self) -> int:
        return len(self.images)

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(H, W, C) of an image."""
        return self.images.shape[1:]


def open_image_set(path: str | Path, *, verify: bool = False) -> ImageSet:
    """Open the packed set in the directory `path` and verify it against the SHA-256 sums in its `dataset.json`.

    The images are read for that once, and again when their file has another size or time, or if `verify` says so: what
    changes a file behind the back of the file system, as a failing disk does, only `verify` finds.

    Raises `UserError` when there is no packed set at `path`, a file is missing or damaged, an array has the wrong
    shape or type, a label is no class, or a sum does not match.
    """
    path = Path(path)
    description = _read_description(path)
    images = _load_array(path / "images.npy", mmap_mode="r")
    labels = _load_array(path / "labels.npy", mmap_mode=None)
    class_names = tuple(description["class_names"])

    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[3] not in CHANNELS:
        expected = "uint8 (N, H, W, C) with 1, 3 or 4 channels"
        raise UserError(f"{path}/images.npy is {images.dtype} {images.shape}; expected {expected}. {REPACK}")
    if labels.dtype != np.int64 or labels.shape != (len(images),) or len(labels) == 0:
        expected = f"int64 ({len(images)},), not empty"
        raise UserError(f"{path}/labels.npy is {labels.dtype} {labels.shape}; expected {expected}. {REPACK}")
    if labels.min() < 0 or labels.max() >= len(class_names):
        raise UserError(
            f"{path}/labels.npy has labels from {labels.min()} to {labels.max()}, but dataset.json names "
            f"{len(class_names)} classes. {REPACK}"
        )

    images_sha256 = file_array_sha256(path / "images.npy", images, anew=verify)
    sums = {"images": images_sha256, "labels": array_sha256(labels)}
    for name, actual in sums.items():
        if actual != description[f"{name}_sha256"]:
            raise UserError(f"{path}/{name}.npy does not match its SHA-256 in dataset.json: it was changed. {REPACK}")
    total = content_sha256(sums["images"], sums["labels"], class_names)
    if total != description["content_sha256"]:
        raise UserError(f"{path}/dataset.json: the class names do not match content_sha256: it was changed. {REPACK}")
    labels.flags.writeable = False
    return ImageSet(images, labels, class_names, path, description["split"], total, images_sha256)


def content_sha256(images_sha256: str, labels_sha256: str, class_names: tuple[str, ...]) -> str:
    """SHA-256 hex over both arrays' sums and the class names."""
    return hashlib.sha256(json.dumps([images_sha256, labels_sha256, list(class_names)]).encode()).hexdigest()


def is_image_set(path: Path) -> bool:
    """Whether `path` looks like a packed set; says nothing about its being intact."""
    return (path / "dataset.json").is_file() and (path / "images.npy").is_file()


# ----------------------------------------------------------------------------------------------------------------------
# Reading

DESCRIPTION_TYPES = {
    "class_names": list,
    "split": str,
    "images_sha256": str,
    "labels_sha256": str,
    "content_sha256": str,
}


def _read_description(path: Path) -> dict:
    """The checked content of `dataset.json`."""
    file = path / "dataset.json"
    if not file.is_file():
        raise UserError(_what_it_is_instead(path))
    try:
        description = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read {file}: {error}. {REPACK}") from error
    if not isinstance(description, dict) or description.get("format_version") != FORMAT_VERSION:
        raise UserError(f"{file} is not a packed set's description of format version {FORMAT_VERSION}. {REPACK}")
    for key, expected in DESCRIPTION_TYPES.items():
        if not isinstance(description.get(key), expected):
            raise UserError(f"{file} is damaged: `{key}` is missing or no {expected.__name__}. {REPACK}")
    return description


def _load_array(file: Path, mmap_mode: str | None) -> np.ndarray:
    try:
        array = np.load(file, mmap_mode=mmap_mode, allow_pickle=False)
    except FileNotFoundError as error:
        raise UserError(f"{file} is missing. {REPACK}") from error
    except Exception as error:  # numpy raises almost anything on a damaged file
        raise UserError(f"cannot read {file}: {error}. {REPACK}") from error
    if not isinstance(array, np.ndarray):
        raise UserError(f"{file} is an .npz of another name, not an array. {REPACK}")
    return array


def _what_it_is_instead(path: Path) -> str:
    pack = "python -m improved_diffusion.data"
    if not path.exists():
        return (
            f"there is no packed image set at {path}; make one with `{pack} food101 --out {path}`, "
            f"`{pack} folder PATH --out {path}` or `{pack} synthetic --out {path}`"
        )
    if path.is_file():
        kind = "a zip archive" if zipfile.is_zipfile(path) else "a file"
        return f"{path} is {kind}, not a packed image set; pack a folder or a zip with `{pack} folder PATH --out DIR`"
    if not any(path.iterdir()):
        return f"{path} is an empty folder, not a packed image set; fill it with `{pack} ... --out {path}`"
    if (path / "images.npy").is_file():
        return f"{path}/dataset.json is missing. {REPACK}"
    if (path / "index.json").is_file():
        return f"{path} is a folder of shards, from which train.py alone reads; give the packed set that it was made of"
    return (
        f"{path} is a folder without dataset.json, not a packed image set; "
        f"if it holds class folders of images, run `{pack} folder {path} --out DIR`"
    )
