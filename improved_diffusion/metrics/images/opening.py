"""Opening a set of images, wherever it lies."""

from __future__ import annotations

import struct
import zipfile
from pathlib import Path

import numpy as np
import torch

from improved_diffusion.data.compositing import on_white
from improved_diffusion.data.containers import Archive, Folder
from improved_diffusion.data.image_set import ImageSet, open_image_set
from improved_diffusion.errors import UserError
from improved_diffusion.metrics.images.files import FileSource
from improved_diffusion.metrics.images.sources import ArraySource, Source
from improved_diffusion.run_directory import is_run_directory

ARRAY_KEYS = ("arr_0", "images")  # of an .npz: numpy's default name, and the obvious one
CLASS_KEYS = ("labels", "class_names")
READ_HEADER = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
READ_BYTES = 1 << 20
LOCAL_HEADER, NAME_LENGTHS = 30, 26  # bytes before a zip member's name, and before the lengths of its name and extra


def open_source(path: Path | str) -> Source:
    """The images at `path`: an image folder, a zip of images, a packed set, or an .npy or .npz of uint8 (N, H, W, C).

    Raises:
        UserError: none of these, nothing there, or fewer than two images.
    """
    path = Path(path)
    name = str(path)
    if not path.exists():
        raise UserError(f"there is nothing at {path}")
    if is_run_directory(path):
        raise UserError(f"{path} is a run directory, not a set of images: generate samples from it first")
    if path.is_dir():
        if (path / "dataset.json").is_file():
            return image_set_source(open_image_set(path))
        return FileSource(name, Folder(path))
    if path.suffix.lower() in (".npy", ".npz"):
        return ArraySource(name, *load_images(path))
    if zipfile.is_zipfile(path):
        return FileSource(name, Archive(path))
    raise UserError(f"{path} is no set of images: expected a folder, a zip, a packed set, an .npy or an .npz")


def open_image(source: Source, index: int) -> np.ndarray:
    """uint8 (H, W, 3): one image of a source, on white where it is transparent."""
    image = next(iter(source.batches(1, index, index + 1))).images[0]
    return on_white(torch.from_numpy(image)).numpy()


def image_set_source(images: ImageSet) -> ArraySource:
    """A packed set as a source."""
    return ArraySource(
        *(str(images.path), images.images, images.labels, images.class_names), images_sha256=images.images_sha256
    )


def load_images(path: Path) -> tuple[np.ndarray, np.ndarray | None, tuple[str, ...] | None]:
    """The array in an .npy file, or the one under `arr_0` or `images` in an .npz, memory-mapped unless it is
    compressed; of an .npz also `labels`, numbers or names, and `class_names`, if it has them.

    Raises:
        UserError: a damaged file, an .npz without such a key, or labels that do not fit.
    """
    try:
        loaded = np.load(path, mmap_mode="r", allow_pickle=False)
        arrays = None if isinstance(loaded, np.ndarray) else _wanted(path, loaded)
        present = [] if arrays is None else loaded.files
    except Exception as error:  # numpy, zipfile and zlib raise almost anything on a damaged file
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UserError(f"cannot read {path}: it is damaged or no NumPy file ({reason})") from error
    if arrays is None:
        return loaded, None, None
    images = next((arrays[key] for key in ARRAY_KEYS if key in arrays), None)
    if images is None:
        found = ", ".join(present) or "nothing"
        raise UserError(f"{path} has no images: expected a key {' or '.join(ARRAY_KEYS)}, found {found}")
    return images, *_classes(path, images, arrays.get("labels"), arrays.get("class_names"))


def _wanted(path: Path, npz: np.lib.npyio.NpzFile) -> dict[str, np.ndarray]:
    images = {key: _mapped(path, npz, key) for key in ARRAY_KEYS if key in npz}
    return images | {key: npz[key] for key in CLASS_KEYS if key in npz}


def _mapped(path: Path, npz: np.lib.npyio.NpzFile, key: str) -> np.ndarray:
    """The array under `key`: memory-mapped, once its checksum was compared, where it lies in the file as it is."""
    info = npz.zip.getinfo(key if key in npz.zip.namelist() else f"{key}.npy")
    with npz.zip.open(info) as stream:
        version = np.lib.format.read_magic(stream)
        if info.compress_type != zipfile.ZIP_STORED or version not in READ_HEADER:
            return npz[key]
        shape, fortran_order, dtype = READ_HEADER[version](stream)
        header_bytes = stream.tell()
        while stream.read(READ_BYTES):  # the end raises an error where the checksum differs
            pass
    if dtype.hasobject or 0 in shape:
        return npz[key]
    with path.open("rb") as file:
        file.seek(info.header_offset + NAME_LENGTHS)
        start = info.header_offset + LOCAL_HEADER + sum(struct.unpack("<HH", file.read(4)))
    return np.memmap(path, dtype, "r", start + header_bytes, shape, "F" if fortran_order else "C")


def _classes(
    path: Path, images: np.ndarray, labels: np.ndarray | None, names: np.ndarray | None
) -> tuple[np.ndarray | None, tuple[str, ...] | None]:
    """Labels as numbers, and the names of the classes if there are any."""
    if labels is None:
        return None, None
    if labels.shape != images.shape[:1] or not labels.shape:
        raise UserError(f"{path} has images of shape {images.shape} and labels of shape {labels.shape}")
    if labels.dtype.kind in "US":
        texts = np.char.decode(labels, "utf-8", "replace") if labels.dtype.kind == "S" else labels
        found, labels = np.unique(texts, return_inverse=True)
        return labels, tuple(found.tolist())
    if labels.dtype.kind not in "iu":
        raise UserError(f"{path}: the labels are {labels.dtype}; they must be integers or names")
    names = None if names is None else tuple(map(str, np.atleast_1d(names)))
    if names is not None and ((labels < 0) | (labels >= len(names))).any():
        raise UserError(f"{path} has labels from {labels.min()} to {labels.max()} and {len(names)} class_names")
    return labels, names
