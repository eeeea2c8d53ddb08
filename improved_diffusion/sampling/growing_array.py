"""An .npz of images that grows on disk row by row, so that neither their number nor several processes matter."""

from __future__ import annotations

import contextlib
import zipfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np

from improved_diffusion.files import atomic_write

WriteRow = Callable[[int, np.ndarray], None]


@contextlib.contextmanager
def open_rows(file: Path) -> Iterator[WriteRow]:
    """Yield a function that writes row i of the array in the .npy `file`.

    Not through a memory map: its pages count as memory of the process, and of a page in which rows of two machines meet
    a network file system may lose one.
    """
    array = np.load(file, mmap_mode="r")
    start, row_bytes = array.offset, array[0].nbytes
    del array
    with file.open("r+b") as stream:

        def write(row: int, values: np.ndarray) -> None:
            stream.seek(start + row * row_bytes)
            stream.write(np.ascontiguousarray(values).data)

        yield write


def write_npz(out: Path, images_file: Path, labels: np.ndarray, class_names: Sequence[str]) -> None:
    """Write the .npz `out`: the array of the .npy `images_file` as `arr_0`, copied piece by piece, and `labels`, which
    are indices into `class_names`.

    Raises:
        UserError: it cannot be written.
    """
    with atomic_write(out) as temporary, zipfile.ZipFile(temporary, "w") as archive:
        archive.write(images_file, "arr_0.npy")
        for name, array in (("labels", labels), ("class_names", np.array(class_names))):
            with archive.open(f"{name}.npy", "w") as stream:
                np.lib.format.write_array(stream, array)
