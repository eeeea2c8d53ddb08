"""What only a GPU can show."""

from __future__ import annotations

import pytest
import torch

from improved_diffusion.data import open_image_set
from improved_diffusion.runtime.devices import Processes
from improved_diffusion.training.trainer import Trainer

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
LOSSES = [["--loss=mse"], ["--loss=hybrid", "--training.ema_lengths=[0.1]"]]


@pytest.fixture
def trainer_on(tiny_config, tiny_set):
    def make(device: str, *flags: str) -> Trainer:
        config = tiny_config(*flags, "--model.dropout=0")
        return Trainer(config, open_image_set(tiny_set), Processes(torch.device(device)))

    return make


@pytest.mark.parametrize("flags", LOSSES, ids=["mse", "hybrid"])
def test_a_step_waits_for_nothing(trainer_on, flags):
    trainer = trainer_on("cuda", *flags)
    batches = trainer.stream.batches(0)
    for _ in range(3):  # allocates, and chooses algorithms
        trainer.train_step(*next(batches))
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(3):
            trainer.train_step(*next(batches))
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("flags", LOSSES, ids=["mse", "hybrid"])
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
    for name, value in means[0].items():
        assert means[1][name] == pytest.approx(value, rel=1e-3), name
