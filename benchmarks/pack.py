"""How fast images are packed: `python benchmarks/pack.py [FOLDER_OR_ZIP]`, without one a zip of JPEGs made here."""

from __future__ import annotations

import argparse
import io
import tempfile
import time
import zipfile
from pathlib import Path

import numpy as np
from PIL import Image

from improved_diffusion.data.labelled_files import labelled_folder
from improved_diffusion.data.packing import pack, usable_cores
from improved_diffusion.errors import user_errors_exit


def make_zip(path: Path, count: int, size: int) -> Path:
    """`count` JPEGs of smooth noise, about as large as photos of `size` x `size` pixels are."""
    rng = np.random.default_rng(0)
    with zipfile.ZipFile(path, "w") as archive:
        for i in range(count):
            coarse = Image.fromarray(rng.integers(0, 256, (size // 4, size // 4, 3), dtype=np.uint8))
            buffer = io.BytesIO()
            coarse.resize((size, size), Image.Resampling.BICUBIC).save(buffer, "JPEG", quality=75)
            archive.writestr(f"{i % 10}/{i}.jpg", buffer.getvalue())
    return path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("source", type=Path, nargs="?", help="a folder of class folders, or a zip of one")
    parser.add_argument("--image-size", type=int, default=64, help="side of the packed images in pixels")
    parser.add_argument("--made-size", type=int, default=64, help="side of the JPEGs made here")
    parser.add_argument("--made-count", type=int, default=20_000, help="how many of them")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        path = arguments.source or make_zip(folder / "made.zip", arguments.made_count, arguments.made_size)
        print("workers    images   seconds  images/s")
        for workers in sorted({1, usable_cores()}):
            start = time.perf_counter()
            packed = pack(labelled_folder(path), folder / str(workers), arguments.image_size, workers=workers)
            seconds = time.perf_counter() - start
            count = sum(split.num_images for split in packed)
            print(f"{workers:7}  {count:8,}  {seconds:8.1f}  {count / seconds:8,.0f}")


if __name__ == "__main__":
    with user_errors_exit():
        main()
