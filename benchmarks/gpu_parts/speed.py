"""How fast training, sampling and measuring are: the second part of gpu.py."""

from __future__ import annotations

import dataclasses
import itertools
import time
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch

from gpu_parts.cases import Case, Row, memory, random_images, reset_memory, seconds_of, synchronize, with_training
from improved_diffusion.config import Config, SamplingConfig
from improved_diffusion.diffusion.noise import NOISES
from improved_diffusion.diffusion.samplers import SAMPLERS
from improved_diffusion.metrics.frechet import frechet_distance
from improved_diffusion.metrics.inception.extractor import full_float32
from improved_diffusion.metrics.inception.network import Inception
from improved_diffusion.metrics.inception.preprocessing import preprocess
from improved_diffusion.models.build import build_network, build_sampling_denoiser
from improved_diffusion.runtime.devices import Processes, arithmetic, with_autocast
from improved_diffusion.sampling.generate import SampleKey, generate
from improved_diffusion.training.cuda_graph import CALLS_BEFORE_CAPTURE
from improved_diffusion.training.flops import flops_per_image, peak_tflops
from improved_diffusion.training.trainer import Trainer

CLASSES = 101
MODES: dict[str, dict[str, bool]] = {
    "eager": {},
    "captured": {"cuda_graph": True},
    "compiled": {"compile": True},
    "compiled, captured": {"compile": True, "cuda_graph": True},
}


class Size(NamedTuple):
    """How much is measured."""

    config: Config
    batches: tuple[int, ...]
    modes: tuple[str, ...]
    sampling_batch: int
    feature_batch: int
    features: int
    seconds: float  # of each measurement


def training_cases(device: torch.device, size: Size, modes: tuple[str, ...]) -> Iterator[Case]:
    """A step of training, of each batch size in each of the `modes`."""
    for mode, batch in itertools.product(modes, size.batches):
        yield Case(f"{mode}, batch {batch}", lambda mode=mode, batch=batch: train(device, size, batch, mode))


def train(device: torch.device, size: Size, batch: int, mode: str) -> Row:
    """`host_ms` is how long Python takes to launch a step: as long as it is below `step_ms`, the GPU never waits."""
    reset_memory(device)
    config = with_training(size.config, batch_size=batch, **MODES[mode])
    images = random_images(2 * batch, config.model.sides[0], CLASSES)
    trainer = Trainer(config, images, Processes(device))
    batches = trainer.stream.batches(0)

    def step() -> None:
        trainer.train_step(*next(batches))

    for _ in range(CALLS_BEFORE_CAPTURE if MODES[mode] else 0):
        step()
    seconds = seconds_of(step, device, size.seconds)
    start = time.perf_counter()
    step()
    host = time.perf_counter() - start
    synchronize(device)
    tflops = flops_per_image(trainer.network, config.model) * batch / seconds / 1e12
    peak = peak_tflops(device, trainer.dtype)
    share = {} if peak is None else {"mfu": tflops / peak}
    rate = {"images_per_second": batch / seconds, "tflops": tflops, **share}
    return {**rate, "step_ms": 1e3 * seconds, "host_ms": 1e3 * host, **memory(device)}


def sampling_cases(device: torch.device, size: Size) -> Iterator[Case]:
    """Each sampler, and both generators of noise for the one that draws it in every step."""
    for sampler in SAMPLERS:
        for noise in NOISES if sampler == "ancestral" else ("philox",):
            yield Case(f"{sampler}, {noise}", lambda sampler=sampler, noise=noise: sample(device, size, sampler, noise))


def sample(device: torch.device, size: Size, sampler: str, noise: str, steps: int = 4) -> Row:
    reset_memory(device)
    config = size.config
    with torch.device(device):
        network = build_network(config, CLASSES)
    network = network.eval().to(memory_format=torch.channels_last)
    run = with_autocast(network, device, arithmetic(config.training.precision, device))
    sampling = SamplingConfig(sampler=sampler, steps=steps, noise=noise, batch_size=size.sampling_batch)
    denoiser = build_sampling_denoiser(config, sampling, run, CLASSES)
    keys = [SampleKey(0, number % CLASSES, number) for number in range(size.sampling_batch)]

    def draw() -> None:
        for _, images in generate(denoiser, keys, config, sampling, device):
            images.cpu()

    seconds = seconds_of(draw, device, size.seconds)
    rate = {"images_per_second": len(keys) / seconds, "ms_per_image_and_step": 1e3 * seconds / steps / len(keys)}
    return {"steps": steps, **rate, **memory(device)}


def noise_cases(device: torch.device, size: Size) -> Iterator[Case]:
    """The noise alone, of images of 64x64."""
    for name in NOISES:
        yield Case(name, lambda name=name: draw_noise(device, size, name))


def draw_noise(device: torch.device, size: Size, name: str) -> Row:
    keys = [(0, 0, number) for number in range(64)]
    draw = NOISES[name](keys, (3, 64, 64), device)
    return {"ms_per_image_and_step": 1e3 * seconds_of(draw, device, size.seconds) / len(keys)}


def measuring_cases(device: torch.device, size: Size) -> Iterator[Case]:
    """Inception features, of random weights, and the distance of two sets of them."""
    for precision in ("float32", "bf16"):
        yield Case(f"features, {precision}", lambda precision=precision: extract(device, size, precision))
    yield Case(f"Frechet distance, {size.features} features", lambda: distance(device, size))


def extract(device: torch.device, size: Size, precision: str) -> Row:
    reset_memory(device)
    network = Inception((size.features,)).eval().to(device, memory_format=torch.channels_last)
    shape = (size.feature_batch, 64, 64, 3)
    images = torch.from_numpy(np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)).to(device)
    dtype = {"bf16": torch.bfloat16, "float32": torch.float32}[precision]

    @torch.inference_mode()
    def features() -> None:
        with full_float32(device):
            x = preprocess(images, "tf1")
            with torch.autocast(device.type, dtype=dtype, enabled=dtype is not torch.float32):
                network(x)

    seconds = seconds_of(features, device, size.seconds)
    return {"images_per_second": len(images) / seconds, **memory(device)}


def distance(device: torch.device, size: Size) -> Row:
    """On the CPU, in float64, wherever the features came from."""
    generator = torch.Generator().manual_seed(0)
    sets = [torch.randn(2 * size.features, size.features, generator=generator, dtype=torch.float64) for _ in range(2)]
    moments = [moment for x in sets for moment in (x.mean(0), x.T.cov())]
    start = time.perf_counter()
    frechet_distance(*moments)
    return {"seconds": time.perf_counter() - start}


def small(config: Config) -> Size:
    """For a CPU: a network of a few channels, and no time."""
    shape = {"num_channels": 16, "channel_multipliers": (1, 2), "num_res_blocks": 1, "attention_resolutions": (8,)}
    model = dataclasses.replace(config.model, image_size=16, **shape)
    diffusion = dataclasses.replace(config.diffusion, timesteps=20)
    reduced = dataclasses.replace(config, model=model, diffusion=diffusion)
    return Size(reduced, (2, 4), ("eager",), sampling_batch=4, feature_batch=2, features=64, seconds=0.0)


def whole(config: Config) -> Size:
    """For a GPU."""
    return Size(config, (64, 256, 512), tuple(MODES), sampling_batch=256, feature_batch=128, features=2048, seconds=3.0)
