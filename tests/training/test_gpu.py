"""What only a GPU can show: `pytest --gpu tests/training/test_gpu.py`."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import pytest
import torch

import improved_diffusion
from improved_diffusion.data import open_image_set
from improved_diffusion.diffusion.noise import NOISES
from improved_diffusion.diffusion.samplers import SAMPLERS
from improved_diffusion.runtime.devices import Processes
from improved_diffusion.sampling.model import change_sampling
from improved_diffusion.training.cuda_graph import CALLS_BEFORE_CAPTURE
from improved_diffusion.training.trainer import Trainer

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU, and pytest --gpu")
KINDS = [
    ["--loss=mse"],
    ["--loss=hybrid", "--training.ema_lengths=[0.1]"],
    ["--loss=vlb", "--diffusion.timesteps=3"],
    ["--training.accumulation=2", "--training.grad_clip=null"],
]
every_kind = pytest.mark.parametrize("flags", KINDS, ids=["mse", "hybrid", "vlb", "accumulated"])
WARM = CALLS_BEFORE_CAPTURE + 1


@pytest.fixture
def trainer_on(tiny_config, tiny_set):
    def make(device: str, *flags: str) -> Trainer:
        config = tiny_config("--model.dropout=0", *flags)
        return Trainer(config, open_image_set(tiny_set), Processes(torch.device(device)))

    return make


@contextlib.contextmanager
def no_waiting() -> Iterator[None]:
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def weights_after(trainer: Trainer, steps: int) -> torch.Tensor:
    batches = trainer.stream.batches(0)
    for _ in range(steps):
        trainer.train_step(*next(batches))
    return torch.cat([weights.detach().flatten() for weights in trainer.network.parameters()])


@every_kind
@pytest.mark.parametrize("captured", [False, True], ids=["eager", "captured"])
def test_a_step_waits_for_nothing(trainer_on, flags, captured):
    trainer = trainer_on("cuda", *flags, "--model.dropout=0.1", f"--training.cuda_graph={captured}")
    batches = trainer.stream.batches(0)
    for _ in range(WARM):  # allocates, chooses algorithms, and captures
        trainer.train_step(*next(batches))
    with no_waiting():
        for _ in range(3):
            trainer.train_step(*next(batches))
    assert trainer.terms.are_finite(trainer.processes)


@every_kind
@pytest.mark.parametrize("how", ["cuda_graph", "compile"])
def test_captured_and_compiled_steps_are_the_step(trainer_on, flags, how):
    start = weights_after(trainer_on("cuda", *flags), 0)
    eager = weights_after(trainer_on("cuda", *flags), WARM + 3)
    other = weights_after(trainer_on("cuda", *flags, f"--training.{how}=true"), WARM + 3)
    # Not weight by weight: a bias before a normalisation has no gradient but rounding, and Adam follows it.
    assert torch.linalg.vector_norm(other - eager) < 0.1 * torch.linalg.vector_norm(eager - start)


def test_dropout_is_drawn_anew_by_each_replay(trainer_on):
    """As by a step that is not captured: both draw from the generator that is seeded for each step."""
    flags = ("--model.dropout=0.5", "--training.lr=1e-9")
    records = []
    for captured in (False, True):
        trainer = trainer_on("cuda", *flags, f"--training.cuda_graph={captured}")
        batch, losses = trainer.stream.batch(0), []
        for _ in range(WARM + 3):
            trainer.train_step(*batch)
            losses.append(trainer.terms.flush(trainer.processes)["loss"])
        records.append(losses)
    assert records[1] == pytest.approx(records[0], rel=1e-3)


@every_kind
def test_the_same_images_and_levels_give_the_same_loss_as_on_a_cpu(trainer_on, flags, monkeypatch):
    """The noise is drawn on the device, by other generators: here it is that of the CPU on both."""
    draw = torch.randn
    monkeypatch.setattr(
        torch,
        "randn",
        lambda *shape, generator, device: draw(*shape, generator=torch.Generator().manual_seed(0)).to(device),
    )
    means = []
    for device in ("cpu", "cuda"):
        trainer = trainer_on(device, *flags)
        trainer.train_step(*trainer.stream.batch(0))
        means.append(trainer.terms.flush(trainer.processes))
    assert means[1] == pytest.approx(means[0], rel=1e-3)


@pytest.mark.parametrize("name", NOISES)
def test_the_noise_of_a_sample_is_that_of_the_cpu(name):
    keys = [(seed, label, number) for seed in (0, 2**40) for label in range(3) for number in range(3)]
    noises = [NOISES[name](keys, (3, 16, 16), device) for device in ("cpu", "cuda")]
    for _ in range(3):
        on_cpu, on_gpu = (noise() for noise in noises)
        torch.testing.assert_close(on_gpu.cpu(), on_cpu, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_sampling_waits_for_nothing_and_draws_the_pictures_of_the_cpu(tiny_run, sampler):
    pictures = []
    for device in ("cpu", "cuda"):
        model = improved_diffusion.load(tiny_run, device=device)
        sampling = change_sampling(model.config.sampling, sampler=sampler, steps=4, noise="philox", guidance_scale=2.0)
        keys = model.keys(None, 2, seed=0)
        pictures.append(next(model.draw(keys, sampling))[1].astype(int))
        if device == "cuda":
            between = no_waiting()  # from the first prediction to the last: before and after, copies have to wait

            def enter_or_leave(step: int, prediction: object, between=between) -> None:
                if step == 3:
                    between.__enter__()
                elif step == 0:
                    between.__exit__(None, None, None)

            next(model.draw(keys, sampling, on_step=enter_or_leave))
    assert abs(pictures[0] - pictures[1]).max() <= 2
