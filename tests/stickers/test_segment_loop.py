"""What the loop of a cut-out's training does when it is told to stop, with a trainer that computes nothing."""

from __future__ import annotations

import signal
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from improved_diffusion.files import read_jsonl
from improved_diffusion.run_directory import RunDirectory
from improved_diffusion.stickers.segment import loop as segment_loop
from improved_diffusion.stickers.segment.config import SegmentConfig, TrainingConfig

LOOKS = 4  # steps between them


class Idle:
    """A trainer that counts; as it takes step `interrupted`, it is told `signals` times to stop."""

    def __init__(self, interrupted: int | None = None, signals: int = 0, step: int = 0):
        training = TrainingConfig(steps=6, batch_size=1, log_every=100, save_every=100, evaluate_every=LOOKS)
        self.config = SegmentConfig(training=training)
        self.step, self.seconds, self.interrupted, self.signals = step, 1.0, interrupted, signals
        self.means = SimpleNamespace(sums={}, flush=lambda: {"loss": 0.0})
        self.network, self.ema = torch.nn.Linear(1, 1), SimpleNamespace(weights=lambda rate: {})

    def train_step(self, *batch: torch.Tensor) -> None:
        self.step += 1
        self.seconds += 1
        for _ in range(self.signals if self.step == self.interrupted else 0):
            signal.raise_signal(signal.SIGINT)

    def state_dict(self) -> dict:
        return {"step": self.step}


@pytest.fixture
def train(tmp_path, monkeypatch):
    monkeypatch.setattr(segment_loop, "learned", lambda network: {})
    sheet = np.zeros((2, 2, 3), np.uint8)

    def train(trainer: Idle) -> bool:
        look = lambda network: ({"metric": "IoU", "value": 1.0}, sheet)  # noqa: E731
        pictures = [(torch.zeros(1), torch.zeros(1))] * 6
        return segment_loop.SegmentLoop(trainer, pictures, "hash", look, RunDirectory(tmp_path)).train()

    return train


def looked_at(run: Path) -> list[int]:
    return [record["step"] for record in read_jsonl(run / "evaluations.jsonl")]


@pytest.mark.parametrize("signals", [1, 2])
def test_who_signals_twice_loses_no_step_and_a_look_is_left_to_the_resumed_run(train, signals, tmp_path, capfd):
    assert not train(Idle(LOOKS, signals))
    assert ("once more interrupts at once" in capfd.readouterr().err) == (signals == 2)
    assert RunDirectory(tmp_path).latest_checkpoint().name == f"step_{LOOKS:07d}.pt"
    assert looked_at(tmp_path) == []
    assert train(Idle(step=LOOKS))
    assert looked_at(tmp_path) == [LOOKS, 6]


def test_a_third_signal_interrupts_at_once(train, tmp_path):
    with pytest.raises(KeyboardInterrupt):
        train(Idle(2, 3))
    assert not RunDirectory(tmp_path).checkpoint_files()
