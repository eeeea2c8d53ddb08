"""Opening a set of images, wherever it lies."""

from __future__ import annotations

import zipfile
from pathlib import Path

import numpy as np

from improved_diffusion.data.image_set import ImageSet, open_image_set
from improved_diffusion.data.sources import Archive, Folder
from improved_diffusion.errors import UserError
from improved_diffusion.metrics.images.files import FileSource
from improved_diffusion.metrics.images.sources import ArraySource, Source
from improved_diffusion.run_directory import is_run_directory

ARRAY_KEYS = ("arr_0", "images")  # of an .npz: numpy's default name, and the obvious one


def open_source(path: Path | str) -> Source:
    """The images at `path`: an image folder, a zip of images, a packed set, or an .npy or .npz of uint8 (N, H, W, 3).

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
    """uint8 (H, W, 3): one image of a source."""
    return next(iter(source.batches(1, index, index + 1))).images[0]


def image_set_source(images: ImageSet) -> ArraySource:
    """A packed set as a source."""
    return ArraySource(str(images.path), images.images, images.labels, images.class_names)


def load_images(path: Path) -> tuple[np.ndarray, np.ndarray | None, tuple[str, ...] | None]:
    """The array in an .npy file (memory-mapped), or the one under `arr_0` or `images` in an .npz; of the latter also
    `labels` and `class_names`, if it has them.

    Raises:
        UserError: a damaged file, or an .npz without such a key.
    """
    try:
        loaded = np.load(path, mmap_mode="r", allow_pickle=False)
        if isinstance(loaded, np.ndarray):
            return loaded, None, None
        with loaded:
            key = next((key for key in ARRAY_KEYS if key in loaded), None)
            if key is not None:
                images = loaded[key]
                labels = loaded.get("labels")
                names = tuple(map(str, loaded["class_names"])) if "class_names" in loaded else None
                if labels is not None and labels.shape != (len(images),):
                    raise UserError(f"{path} has {len(images)} images and labels of shape {labels.shape}")
                return images, labels, names
            keys = ", ".join(loaded.files) or "nothing"
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
        raise UserError(f"cannot read {path}: it is damaged or no NumPy file ({error})") from error
    raise UserError(f"{path} has no images: expected a key {' or '.join(ARRAY_KEYS)}, found {keys}")
