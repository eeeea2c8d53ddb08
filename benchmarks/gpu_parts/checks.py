"""Whether a GPU computes what the CPU does: the first part of gpu.py."""

from __future__ import annotations

import contextlib
import dataclasses
import io
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

import improved_diffusion
from gpu_parts.cases import Case, Row, random_images, with_training
from improved_diffusion.config import Config, DiffusionConfig, TrainingConfig, UNetConfig
from improved_diffusion.diffusion.noise import NOISES, seeded_generator
from improved_diffusion.diffusion.samplers import SAMPLERS
from improved_diffusion.metrics.inception.extractor import full_float32
from improved_diffusion.metrics.inception.network import Inception
from improved_diffusion.runtime.devices import Processes
from improved_diffusion.sampling.model import Model, change_sampling
from improved_diffusion.training.cuda_graph import CALLS_BEFORE_CAPTURE
from improved_diffusion.training.trainer import Trainer

PRETRAINED = Path(__file__).parents[2] / "pretrained" / "synthetic-64"
CPU = torch.device("cpu")
STEPS = 2 * (CALLS_BEFORE_CAPTURE + 1)

SMALL = Config(
    model=UNetConfig(image_size=16, num_channels=32, channel_multipliers=(1, 2), attention_resolutions=(8,)),
    diffusion=DiffusionConfig(timesteps=50),
    training=TrainingConfig(batch_size=8, lr=1e-3, precision="float32"),
)


def correctness_cases(device: torch.device) -> Iterator[Case]:
    """Each compares the CPU with `device`, or `device` with itself; on a CPU both are the same."""
    yield Case("loss and gradients, float32", lambda: loss_and_gradients(device, "float32", 1e-4, 1e-3))
    yield Case("loss and gradients, bf16", lambda: loss_and_gradients(device, "bf16", 3e-2, 1e-1))
    for noise in NOISES:
        yield Case(f"noise of samples, {noise}", lambda noise=noise: same_noise(device, noise))
    for sampler in SAMPLERS:
        yield Case(f"samples, {sampler}", lambda sampler=sampler: same_samples(device, sampler))
    yield Case("Inception features", lambda: same_features(device))
    yield Case("resume", lambda: same_training(device, SMALL, interrupted=True))
    if device.type == "cuda":
        yield Case("no wait in a step", lambda: no_wait(device))
        for how in ("cuda_graph", "compile"):
            yield Case(f"training.{how}", lambda how=how: same_training(device, with_training(SMALL, **{how: True})))


def verdict(difference: float, limit: float) -> Row:
    return {"passed": difference <= limit, "difference": difference, "limit": limit}


def relative(found: list[Tensor], expected: list[Tensor]) -> float:
    """|found - expected| / |expected|, of all tensors together."""
    differences = [a.detach().cpu() - b.detach().cpu() for a, b in zip(found, expected, strict=True)]
    return norm(differences) / norm(expected)


def norm(tensors: list[Tensor]) -> float:
    return float(torch.linalg.vector_norm(torch.cat([tensor.detach().flatten().double() for tensor in tensors])))


def make_trainer(device: torch.device, config: Config = SMALL) -> Trainer:
    """Whose last convolutions are not zero, as they are at first: most gradients would be."""
    trainer = Trainer(config, random_images(64, 16, classes=4), Processes(device))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in trainer.network.parameters():
            parameter.add_(0.02 * torch.randn(parameter.shape, generator=generator).to(device))
    return trainer


def loss_and_gradients(device: torch.device, precision: str, loss_limit: float, gradient_limit: float) -> Row:
    """Of the hybrid loss, for the same images, noise and timesteps."""
    results = []
    for place, arithmetic in ((CPU, "float32"), (device, precision)):
        trainer = make_trainer(place, with_training(SMALL, precision=arithmetic))
        x_start, y = trainer.stream.batch(0)
        noise = torch.randn(x_start.shape, generator=seeded_generator(0)).to(place)
        t = torch.arange(len(y)).to(place) * 6
        loss, _ = trainer.loss(x_start, t, y, noise, torch.ones(len(y)).to(place))
        loss.backward()
        results.append((loss, [parameter.grad for parameter in trainer.network.parameters()]))
    (expected, gradients), (found, found_gradients) = results
    of_loss, of_gradients = relative([found], [expected]), relative(found_gradients, gradients)
    row = verdict(max(of_loss / loss_limit, of_gradients / gradient_limit), 1.0)
    return {**row, "loss": of_loss, "gradients": of_gradients}


def same_noise(device: torch.device, name: str) -> Row:
    keys = [(seed, label, number) for seed in (0, 2**40) for label in range(4) for number in range(4)]
    draws = [NOISES[name](keys, (3, 32, 32), place) for place in (CPU, device)]
    for _ in range(2):
        expected, found = (draw() for draw in draws)
    return verdict(float((found.cpu() - expected).abs().max()), 1e-6)


def same_samples(device: torch.device, sampler: str) -> Row:
    """Of the shipped model in float32: the share of values that are more than one grey level away."""
    images = []
    for place in (CPU, device):
        model: Model = dataclasses.replace(improved_diffusion.load(PRETRAINED, device=place), precision="float32")
        sampling = change_sampling(model.config.sampling, sampler=sampler, steps=2)
        keys = model.keys([0, 1], 1, seed=0)
        images.append(np.concatenate([batch for _, batch in model.draw(keys, sampling)]).astype(int))
    return verdict(float((np.abs(images[0] - images[1]) > 1).mean()), 0.01)


def same_features(device: torch.device) -> Row:
    """Of the Inception network's first layers, with random weights, in full float32."""
    torch.manual_seed(0)
    network, x = Inception((64,)).eval(), torch.randn(1, 3, 299, 299)
    features = []
    for place in (CPU, device):
        with torch.inference_mode(), full_float32(place):
            features.append(network.to(place)(x.to(place))[64])
    return verdict(relative([features[1]], [features[0]]), 1e-4)


def same_training(device: torch.device, config: Config, interrupted: bool = False) -> Row:
    """As an unbroken run of `SMALL` in eager mode. What differs is relative to how far training has come, and may be
    some of it: a bias before a normalisation has no gradient but rounding, and Adam follows it."""
    with steady_algorithms():
        start = [parameter.detach().clone() for parameter in make_trainer(device).network.parameters()]
        expected = take_steps(make_trainer(device), STEPS)
        if interrupted:
            file = io.BytesIO()
            torch.save(take_steps(make_trainer(device, config), STEPS // 2).state_dict(), file)
            file.seek(0)
            found = make_trainer(device, config)
            found.load_state_dict(torch.load(file, weights_only=True, map_location="cpu"))
            take_steps(found, STEPS - STEPS // 2)
        else:
            found = take_steps(make_trainer(device, config), STEPS)
    weights, others = (list(trainer.network.parameters()) for trainer in (expected, found))
    way, apart = ([a - b for a, b in zip(weights, ends, strict=True)] for ends in (start, others))
    row = verdict(norm(apart) / norm(way), 0.1)
    return {**row, "bit_equal": all(torch.equal(a, b) for a, b in zip(weights, others, strict=True))}


def take_steps(trainer: Trainer, steps: int) -> Trainer:
    batches = trainer.stream.batches(trainer.step)
    for _ in range(steps):
        trainer.train_step(*next(batches))
    return trainer


@contextlib.contextmanager
def steady_algorithms() -> Iterator[None]:
    """The same convolution algorithms each time, so that two runs differ by what is compared alone."""
    before = torch.backends.cudnn.benchmark, torch.backends.cudnn.deterministic
    torch.backends.cudnn.benchmark, torch.backends.cudnn.deterministic = False, True
    try:
        yield
    finally:
        torch.backends.cudnn.benchmark, torch.backends.cudnn.deterministic = before


def no_wait(device: torch.device) -> Row:
    """Of the host for the device, within steps of a loss whose sampler of timesteps learns. A wait is an error."""
    config = dataclasses.replace(SMALL, loss="vlb", diffusion=DiffusionConfig(timesteps=50))
    trainer = take_steps(make_trainer(device, config), 2)
    batches = trainer.stream.batches(trainer.step)
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(2):
            trainer.train_step(*next(batches))
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return {"passed": True}
