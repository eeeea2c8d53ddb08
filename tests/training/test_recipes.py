"""The recipes of docs/design.md: what they add trains and samples, with nothing touched but what they name."""

from __future__ import annotations

import typing

import numpy as np
import pytest
import torch

from improved_diffusion import config as settings
from improved_diffusion import settings as parsing
from improved_diffusion.config import SamplingConfig
from improved_diffusion.diffusion import objective, parameterization, samplers
from improved_diffusion.models.build import build_sampling_denoiser
from improved_diffusion.sampling.generate import SampleKey, generate

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def new_parsers(monkeypatch) -> None:
    """None is kept from before an edit."""
    monkeypatch.setattr(parsing, "_shared_parser", parsing._shared_parser.__wrapped__)


def with_name(monkeypatch, kind: type, setting: str, name: str) -> None:
    """Add a name to the choices of a setting, as an edit of its annotation would."""
    literal = typing.get_type_hints(kind)[setting]
    monkeypatch.setitem(kind.__annotations__, setting, literal | typing.Literal[name])


@pytest.mark.parametrize("setting", ["diffusion.prediction", "diffusion.loss_space"])
def test_a_target(setting, monkeypatch, tiny_trainer):
    """x_0 less half of the noise."""
    monkeypatch.setitem(
        parameterization.PARAMETERIZATIONS,
        "half",
        lambda level: (torch.ones_like(level.t), torch.full_like(level.t, -0.5)),
    )
    with_name(monkeypatch, settings.DiffusionConfig, setting.removeprefix("diffusion."), "half")
    trainer = tiny_trainer("--loss=hybrid", f"--{setting}=half")
    trainer.train_step(*trainer.stream.batch(0))
    assert trainer.terms.flush(trainer.processes)["mse"] > 0
    assert drawn(trainer, trainer.config.sampling).shape == (2, 16, 16, 3)


def test_a_weighting(monkeypatch, tiny_trainer):
    monkeypatch.setitem(objective.WEIGHTINGS, "signal", lambda level: level.signal)
    with_name(monkeypatch, settings.DiffusionConfig, "weighting", "signal")
    trainer = tiny_trainer("--loss=mse", "--diffusion.weighting=signal")
    trainer.train_step(*trainer.stream.batch(0))
    assert trainer.terms.flush(trainer.processes)["mse"] > 0


def test_a_sampler(monkeypatch, tiny_trainer):
    """One that believes the first prediction."""

    def at_once(denoiser, schedule, x_T, y, draw_noise, *, gain=1.0, on_step=samplers._ignore):
        return gain * denoiser(x_T, schedule.at(-1), y).x_start

    monkeypatch.setitem(samplers.SAMPLERS, "at_once", at_once)
    monkeypatch.setitem(settings.SAMPLER_OPTIONS, "at_once", ("gain",))
    with_name(monkeypatch, SamplingConfig, "sampler", "at_once")
    trainer = tiny_trainer("--sampling.sampler=at_once", "--sampling.options.gain=0.0")
    assert (drawn(trainer, trainer.config.sampling) == 128).all()


def drawn(trainer, sampling: SamplingConfig) -> np.ndarray:
    denoiser = build_sampling_denoiser(trainer.config, sampling, trainer.network, trainer.num_classes)
    with torch.no_grad():
        ((_, images),) = generate(denoiser, [SampleKey(0, 0, 0), SampleKey(0, 1, 0)], trainer.config, sampling, CPU)
    return images.numpy()
