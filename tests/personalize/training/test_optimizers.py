"""Every optimizer learns, is resumed bit for bit, and has the learning rates of its schedule."""

from __future__ import annotations

import copy
import dataclasses
import io

import pytest
import torch

pytest.importorskip("diffusers")
pytest.importorskip("accelerate")
from transformers.optimization import get_cosine_schedule_with_warmup, get_wsd_schedule  # noqa: E402

from improved_diffusion.errors import UserError  # noqa: E402
from improved_diffusion.personalize.config import FUSABLE, PersonalizeConfig, TrainingConfig  # noqa: E402
from improved_diffusion.personalize.training.optimizers import (  # noqa: E402
    FusedBackward,
    learning_rate,
    make_optimizer,
    set_rates,
    state_bytes,
)
from tests.personalize.training.test_trainer import make_trainer  # noqa: E402

BY_BITSANDBYTES = {"adamw_8bit": {"lr": 1e-3}}  # the paged one is the same, with its state elsewhere
SETTINGS = {
    "adamw": {"lr": 1e-3, "lr_schedule": "cosine", "warmup_steps": 3},
    "adafactor": {"lr": 1e-3, "lr_schedule": "wsd", "cooldown": 0.5},
    "lion": {"lr": 1e-4, "lr_schedule": "constant"},
    "prodigy": {"lr": 1.0, "lr_schedule": "cosine", "warmup_steps": 2},
    **BY_BITSANDBYTES,
}


@pytest.fixture(autouse=True)
def library(request) -> None:
    """Skips an optimizer that is not installed."""
    if getattr(request.node, "callspec", None) and request.node.callspec.params.get("kind") in BY_BITSANDBYTES:
        pytest.importorskip("bitsandbytes")


@pytest.mark.parametrize("kind", SETTINGS)
def test_ten_updates_and_a_resume(kind, fresh_base, photos):
    settings = {"optimizer": kind, "steps": 10, **SETTINGS[kind]}
    unbroken = make_trainer(fresh_base("sd"), photos, **settings)
    weights = [parameter.detach().clone() for parameter in unbroken.trained.parameters.values()]
    for _ in range(10):
        unbroken.train_step()
        if unbroken.step == 7:
            file = io.BytesIO()
            torch.save(unbroken.state_dict(), file)
    moved = [(new - old).abs().max() for new, old in zip(unbroken.trained.parameters.values(), weights, strict=True)]
    assert min(moved) > 0
    assert all(torch.isfinite(parameter).all() for parameter in unbroken.trained.parameters.values())
    file.seek(0)
    resumed = make_trainer(fresh_base("sd"), photos, **settings)
    resumed.load_state_dict(torch.load(file, weights_only=True))
    for _ in range(3):
        resumed.train_step()
    for name, parameter in unbroken.trained.parameters.items():
        assert torch.equal(parameter, resumed.trained.parameters[name]), name


def test_a_learning_rate_of_adafactor_is_one_of_adamw():
    """Also of weights that are 0, as those of an adapter are at first."""
    moved = {}
    for kind in ("adamw", "adafactor"):
        generator = torch.Generator().manual_seed(0)
        parameter = torch.nn.Parameter(torch.zeros(64, 32))
        optimizer = make_optimizer({"unet": [parameter]}, PersonalizeConfig(training=TrainingConfig(optimizer=kind)))
        gradient = torch.randn(64, 32, generator=generator)
        for _ in range(20):
            parameter.grad = gradient + 0.1 * torch.randn(64, 32, generator=generator)
            optimizer.step()
        moved[kind] = parameter.detach().square().mean().sqrt().item()
    assert moved["adafactor"] == pytest.approx(moved["adamw"], rel=0.5)


@pytest.mark.parametrize("kind", SETTINGS)
def test_its_state_takes_what_memory_estimates_say(kind):
    width = 128
    parameters = [torch.nn.Parameter(torch.randn(width, width))]
    optimizer = make_optimizer({"unet": parameters}, settings_of(kind))
    parameters[0].grad = torch.randn(width, width)
    optimizer.step()
    tensors = [value for value in optimizer.state[parameters[0]].values() if isinstance(value, torch.Tensor)]
    # Beside it there are a step's number and, of 8 bits, tables.
    assert sum(tensor.nbytes for tensor in tensors) == pytest.approx(state_bytes(kind, parameters[0]), rel=0.1)


@pytest.mark.parametrize("kind", FUSABLE)
def test_updates_in_the_backward_pass_are_those_of_a_step(kind):
    x = torch.randn(4, 8)
    networks, norms = [], []
    for fuse in (False, True):
        torch.manual_seed(0)
        networks.append(torch.nn.Sequential(torch.nn.Linear(8, 6), torch.nn.SiLU(), torch.nn.Linear(6, 3)))
        optimizer = make_optimizer({"unet": list(networks[-1].parameters())}, settings_of(kind))
        fused = FusedBackward(optimizer, lambda parameters: None) if fuse else None
        for step in range(3):
            set_rates(optimizer, settings_of(kind).training, step, 3)
            networks[-1](x).square().mean().backward()
            if fused is None:
                norms.append(torch.nn.utils.clip_grad_norm_(networks[-1].parameters(), float("inf")))
                optimizer.step()
                optimizer.zero_grad()
            else:
                assert all(parameter.grad is None for parameter in networks[-1].parameters())
                assert fused.gradient_norm() == pytest.approx(norms[step].item(), rel=1e-5)
    torch.testing.assert_close(networks[0].state_dict(), networks[1].state_dict(), rtol=0, atol=0)


def test_a_run_may_change_to_updates_in_the_backward_pass(fresh_base, photos):
    settings = {"optimizer": "adafactor", "lr": 1e-2, "grad_clip": None}
    plain, fused = (make_trainer(fresh_base("sd"), photos, fused_backward=fuse, **settings) for fuse in (False, True))
    plain.train_step()
    fused.load_state_dict(copy.deepcopy(plain.state_dict()))
    assert plain.train_step()["loss"] == fused.train_step()["loss"]
    for name, parameter in plain.trained.parameters.items():
        assert torch.equal(parameter, fused.trained.parameters[name]), name


def test_what_updates_in_the_backward_pass_cannot_do():
    fitting = {"optimizer": "adafactor", "fused_backward": True, "grad_clip": None}
    TrainingConfig(**fitting)
    for setting in (
        {"grad_clip": 1.0},
        {"accumulation": 2},
        {"optimizer": "prodigy", "lr": 1.0},
        {"precision": "fp16"},
    ):
        with pytest.raises(UserError, match="training.fused_backward never has the whole gradient: set training"):
            TrainingConfig(**{**fitting, **setting})


def settings_of(kind: str, **training) -> PersonalizeConfig:
    return PersonalizeConfig(training=TrainingConfig(**{"optimizer": kind, "steps": 20, **SETTINGS[kind], **training}))


@pytest.mark.parametrize("schedule", ["cosine", "wsd"])
def test_learning_rates_are_those_of_transformers(schedule):
    """Up to the place of a step: ours ends a step before 0, theirs begins at it."""
    steps, warm = 40, 8
    config = settings_of("adamw", lr_schedule=schedule, steps=steps, warmup_steps=warm, cooldown=0.25)
    optimizer = make_optimizer({"unet": [torch.nn.Parameter(torch.zeros(1))]}, config)
    ours = []
    for step in range(steps):
        set_rates(optimizer, config.training, step, steps)
        ours.append(optimizer.param_groups[0]["lr"])
    other = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=config.training.lr)
    if schedule == "cosine":
        theirs = get_cosine_schedule_with_warmup(other, warm, steps)
    else:
        theirs = get_wsd_schedule(other, warm, 10, num_training_steps=steps, decay_type="linear")
    expected = []
    for _ in range(steps):
        expected.append(theirs.get_last_lr()[0])
        other.step()
        theirs.step()
    assert ours[warm:] == pytest.approx(expected[warm:], abs=1e-12)
    assert ours[: warm - 1] == pytest.approx(expected[1:warm], abs=1e-12)


def test_parts_have_their_rates_but_for_prodigy():
    config = dataclasses.replace(settings_of("lion", lr_text_encoder=2e-5), train_text_encoder=True)
    assert (learning_rate(config, "unet"), learning_rate(config, "text_encoder_2")) == (1e-4, 2e-5)
    config = dataclasses.replace(settings_of("prodigy", lr_text_encoder=2e-5), train_text_encoder=True)
    assert learning_rate(config, "text_encoder") == 1.0


def test_prodigy_wants_no_rate_of_adamw():
    with pytest.raises(UserError, match="prodigy finds the learning rate itself"):
        settings_of("prodigy", lr=1e-4)
    assert TrainingConfig(adam_8bit=True).optimizer == "adamw_8bit"
