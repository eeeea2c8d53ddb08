"""The image files of a folder or a zip archive as a source of images to measure."""

from __future__ import annotations

import functools
import hashlib
import os
import zipfile
from collections import deque
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import numpy as np

from improved_diffusion.data.containers import Archive, Folder, is_hidden
from improved_diffusion.data.decode import EXTENSIONS, FORMATS, decode_upright
from improved_diffusion.errors import UserError
from improved_diffusion.metrics.images.sources import Batch, check_count

DECODE_AHEAD = 64  # images that wait, decoded, for the network


@dataclass(eq=False)
class FileSource:
    """The image files of a folder or a zip archive, in order of their names.

    Transparent images are composited on white. Nothing is resized, so neighbours of different sizes come in batches of
    their own. Where all images lie in folders, and these are several, the folders are the classes.

    Raises:
        UserError: fewer than two images.
    """

    name: str
    files: Folder | Archive
    rows: np.ndarray | None = None  # which of the images, by their number in order of names; None: all
    broken: dict[int, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        check_count(self.name, len(self))

    def __len__(self) -> int:
        return len(self.image_names)

    @functools.cached_property
    def image_names(self) -> list[str]:
        """Names of the image files, those in subfolders too."""
        try:
            names = [name for name in self.files.names() if not is_hidden(name)]
        except (zipfile.BadZipFile, OSError) as error:
            raise UserError(f"cannot read {self.name}: {error}") from error
        names = sorted(name for name in names if os.path.splitext(name)[1].lower() in EXTENSIONS)
        return names if self.rows is None else [names[row] for row in self.rows]

    @functools.cached_property
    def class_names(self) -> tuple[str, ...] | None:
        """The names of the folders that hold the images; None where they are no classes."""
        folders = {os.path.basename(os.path.dirname(name)) for name in self.image_names}
        return tuple(sorted(folders)) if len(folders) > 1 and "" not in folders else None

    @functools.cached_property
    def labels(self) -> np.ndarray | None:
        """(N,) index of each image's class."""
        if self.class_names is None:
            return None
        label_of = {name: label for label, name in enumerate(self.class_names)}
        return np.array([label_of[os.path.basename(os.path.dirname(name))] for name in self.image_names])

    @functools.cached_property
    def content_hash(self) -> str:
        """SHA-256 over the files' contents in their order, whatever their names: the same for a folder and its zip."""
        with ThreadPoolExecutor() as pool:
            digests = pool.map(self._file_digest, self.image_names)
        return hashlib.sha256("\n".join(["files", *digests]).encode()).hexdigest()

    def batches(self, batch_size: int, start: int = 0, stop: int | None = None) -> Iterator[Batch]:
        """See `Source`; at most `batch_size` at a time. What cannot be decoded is left out and noted in `broken`."""
        indices: list[int] = []
        images: list[np.ndarray] = []
        for index, image in self._decoded(start, len(self) if stop is None else stop):
            if isinstance(image, str):
                self.broken[index] = f"{self.image_names[index]} ({image})"
                continue
            if images and (len(images) == batch_size or image.shape != images[0].shape):
                yield Batch(np.array(indices), np.stack(images))
                indices, images = [], []
            indices.append(index)
            images.append(image)
        if images:
            yield Batch(np.array(indices), np.stack(images))

    def subset(self, rows: np.ndarray) -> FileSource:
        """See `Source`."""
        return FileSource(self.name, self.files, rows if self.rows is None else self.rows[rows])

    def _decoded(self, start: int, stop: int) -> Iterator[tuple[int, np.ndarray | str]]:
        """Each number with its image, or with the reason that there is none; threads decode a few images ahead."""
        with ThreadPoolExecutor() as pool:
            ahead: deque = deque()
            for index in range(start, stop):
                ahead.append((index, pool.submit(self._decode, self.image_names[index])))
                if len(ahead) > DECODE_AHEAD:
                    first, image = ahead.popleft()
                    yield first, image.result()
            for index, image in ahead:
                yield index, image.result()

    def _decode(self, name: str) -> np.ndarray | str:
        data = None
        try:
            data = self.files.read(name)
            return np.asarray(decode_upright(data))
        except MemoryError:
            raise
        except Exception as error:  # Pillow and zipfile raise almost anything on a damaged file
            of_system = isinstance(error, OSError) and not isinstance(error, FileNotFoundError | PermissionError)
            if data is None and of_system:  # the next time it may be read: kept as broken, it would be missing for ever
                raise UserError(f"cannot read {name} of {self.name}: {error}") from error
            return " ".join(str(error).split()) or type(error).__name__

    def _file_digest(self, name: str) -> str:
        try:
            unseen = b"" if "HEIF" in FORMATS or not name.lower().endswith((".heic", ".heif")) else b"unseen"
            return hashlib.sha256(self.files.read(name) + unseen).hexdigest()  # another set once they can be decoded
        except Exception:  # as in _decode: such an image is skipped
            return "unreadable"
