"""Sets of images to measure, from wherever they lie, as batches of uint8 images and a hash of their content."""

from __future__ import annotations

import functools
import hashlib
import io
import os
import warnings
import zipfile
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
from PIL import Image, ImageOps

from improved_diffusion.data.decode import EXTENSIONS, FORMATS, to_rgb
from improved_diffusion.data.image_set import ImageSet, array_sha256, open_image_set
from improved_diffusion.data.sources import Archive, Folder, is_hidden
from improved_diffusion.errors import UserError
from improved_diffusion.run_directory import is_run_directory

ARRAY_KEYS = ("arr_0", "images")  # of an .npz: numpy's default name, and the obvious one
MAX_BROKEN = 0.02  # of the images in a folder or zip; beyond it the set is not the one that was meant
DECODE_AHEAD = 64  # images that wait, decoded, for the network


class Source(Protocol):
    """Images to measure. Anything with these three will do: a model that generates them, for one."""

    @property
    def name(self) -> str:
        """For messages."""

    def __len__(self) -> int: ...

    def batches(self, batch_size: int) -> Iterator[np.ndarray]:
        """uint8 (n, H, W, 3) with n about `batch_size`; H and W may change from batch to batch."""


class StoredSource(Source, Protocol):
    """Images that lie somewhere, so that what is measured on them can be kept."""

    @property
    def content_hash(self) -> str:
        """Changes with the images and with nothing else."""


@dataclass(frozen=True, eq=False)
class ArraySource:
    """Images that are decoded already: uint8 (N, H, W, 3), in memory or memory-mapped.

    Raises:
        UserError: an array of another dtype or shape, or of fewer than two images.
    """

    name: str
    images: np.ndarray

    def __post_init__(self) -> None:
        images = self.images
        if images.dtype != np.uint8 or images.ndim != 4 or images.shape[-1] != 3:
            raise UserError(
                f"{self.name} holds {images.dtype} {images.shape}: expected images as uint8 (N, H, W, 3), 0 to 255"
            )
        _check_count(self.name, len(images))

    def __len__(self) -> int:
        return len(self.images)

    @functools.cached_property
    def content_hash(self) -> str:
        """SHA-256 of the shape and the pixels."""
        return hashlib.sha256(f"array {self.images.shape} {array_sha256(self.images)}".encode()).hexdigest()

    def batches(self, batch_size: int) -> Iterator[np.ndarray]:
        """uint8 (n, H, W, 3) with n at most `batch_size`."""
        for start in range(0, len(self.images), batch_size):
            yield np.array(self.images[start : start + batch_size])


@dataclass(frozen=True, eq=False)
class FileSource:
    """The image files of a folder or a zip archive, in order of their names.

    Transparent images are composited on white. Nothing is resized, so neighbours of different sizes come in batches of
    their own. Images that cannot be decoded are skipped and reported.

    Raises:
        UserError: fewer than two images.
    """

    name: str
    files: Folder | Archive

    def __post_init__(self) -> None:
        _check_count(self.name, len(self))

    def __len__(self) -> int:
        return len(self.image_names)

    @functools.cached_property
    def image_names(self) -> list[str]:
        """Names of the image files, those in subfolders too."""
        try:
            names = [name for name in self.files.names() if not is_hidden(name)]
        except (zipfile.BadZipFile, OSError) as error:
            raise UserError(f"cannot read {self.name}: {error}") from error
        return sorted(name for name in names if os.path.splitext(name)[1].lower() in EXTENSIONS)

    @functools.cached_property
    def content_hash(self) -> str:
        """SHA-256 over the files' contents, whatever their names and order: the same for a folder and its zip."""
        with ThreadPoolExecutor() as pool:
            digests = sorted(pool.map(self._file_digest, self.image_names))
        return hashlib.sha256("\n".join(["files", *digests]).encode()).hexdigest()

    def batches(self, batch_size: int) -> Iterator[np.ndarray]:
        """uint8 (n, H, W, 3) with n at most `batch_size`.

        Raises:
            UserError: more than 2 % of the images cannot be decoded. A smaller number is skipped with a warning.
        """
        yield from _batched(self._decodable(), batch_size)

    def _decodable(self) -> Iterator[np.ndarray]:
        broken: list[str] = []
        for name, image in self._decoded():
            if isinstance(image, np.ndarray):
                yield image
                continue
            broken.append(f"{name} ({image})")
            if len(broken) > MAX_BROKEN * len(self):
                raise UserError(
                    f"{self.name}: more than {MAX_BROKEN:.0%} of its {len(self):,} images cannot be decoded, the first "
                    f"is {broken[0]}; mend or remove them"
                )
        if broken:
            warnings.warn(
                f"{self.name}: skipped {len(broken)} of {len(self):,} images that cannot be decoded, the first is "
                f"{broken[0]}",
                stacklevel=2,
            )

    def _decoded(self) -> Iterator[tuple[str, np.ndarray | str]]:
        """Each name with its image, or with the reason that there is none; threads decode a few images ahead."""
        with ThreadPoolExecutor() as pool:
            ahead: deque = deque()
            for name in self.image_names:
                ahead.append((name, pool.submit(self._decode, name)))
                if len(ahead) > DECODE_AHEAD:
                    first, image = ahead.popleft()
                    yield first, image.result()
            for name, image in ahead:
                yield name, image.result()

    def _decode(self, name: str) -> np.ndarray | str:
        try:
            return decode_image(self.files.read(name))
        except Exception as error:  # Pillow raises almost anything on a damaged file
            return " ".join(str(error).split()) or type(error).__name__

    def _file_digest(self, name: str) -> str:
        try:
            return hashlib.sha256(self.files.read(name)).hexdigest()
        except Exception:  # as in _decode: such an image is skipped
            return "unreadable"


def open_source(path: Path | str) -> StoredSource:
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
    suffix = path.suffix.lower()
    if suffix in (".npy", ".npz"):
        return ArraySource(name, load_images(path))
    if zipfile.is_zipfile(path):
        return FileSource(name, Archive(path))
    raise UserError(f"{path} is no set of images: expected a folder, a zip, a packed set, an .npy or an .npz")


def image_set_source(images: ImageSet) -> ArraySource:
    """A packed set as a source."""
    return ArraySource(str(images.path), images.images)


def load_images(path: Path) -> np.ndarray:
    """The array in an .npy file (memory-mapped), or the one under `arr_0` or `images` in an .npz.

    Raises:
        UserError: a damaged file, or an .npz without such a key.
    """
    try:
        loaded = np.load(path, mmap_mode="r", allow_pickle=False)
        if isinstance(loaded, np.ndarray):
            return loaded
        with loaded:
            key = next((key for key in ARRAY_KEYS if key in loaded), None)
            if key is not None:
                return loaded[key]
            keys = ", ".join(loaded.files) or "nothing"
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
        raise UserError(f"cannot read {path}: it is damaged or no NumPy file ({error})") from error
    raise UserError(f"{path} has no images: expected a key {' or '.join(ARRAY_KEYS)}, found {keys}")


def decode_image(data: bytes) -> np.ndarray:
    """The content of an image file to uint8 (H, W, 3): upright, on white, of its own size."""
    with Image.open(io.BytesIO(data), formats=FORMATS) as image:
        ImageOps.exif_transpose(image, in_place=True)
        return np.asarray(to_rgb(image))


def _batched(images: Iterable[np.ndarray], batch_size: int) -> Iterator[np.ndarray]:
    """Stack runs of images of one shape."""
    batch: list[np.ndarray] = []
    for image in images:
        if batch and (len(batch) == batch_size or image.shape != batch[0].shape):
            yield np.stack(batch)
            batch = []
        batch.append(image)
    if batch:
        yield np.stack(batch)


def _check_count(name: str, count: int) -> None:
    if count < 2:
        found = f"{count} image" if count else "no images"
        raise UserError(f"{name} has {found}: at least 2 are needed to measure their statistics")
