"""Optimizers, learning rates, and averages that are chosen after training."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.optim import lr_scheduler

from improved_diffusion.config import TrainingConfig
from improved_diffusion.errors import UserError
from improved_diffusion.models.build import set_moments
from improved_diffusion.models.transformer import Transformer
from improved_diffusion.run_directory import RunDirectory
from improved_diffusion.training.optimization import learning_rate, make_optimizers
from improved_diffusion.training.start import require_same_learning_rates


def rates_of(scheduler: lr_scheduler.LRScheduler, steps: int) -> list[float]:
    rates = []
    for _ in range(steps):
        rates.append(scheduler.get_last_lr()[0])
        scheduler.optimizer.step()
        scheduler.step()
    return rates


class TestLearningRate:
    def test_cosine_is_that_of_pytorch(self):
        training = TrainingConfig(steps=50, lr=0.3, lr_schedule="cosine")
        optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.3)
        expected = rates_of(lr_scheduler.CosineAnnealingLR(optimizer, T_max=50), 50)
        assert [learning_rate(training, step) for step in range(50)] == pytest.approx(expected)

    def test_the_cool_down_is_linear_as_that_of_pytorch(self):
        training = TrainingConfig(steps=50, lr=0.3, lr_schedule="wsd", cooldown=0.2, warmup_steps=5)
        optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.3)
        warm = lr_scheduler.LinearLR(optimizer, 1 / 5, 1.0, total_iters=4)
        stable = lr_scheduler.ConstantLR(optimizer, 1.0, total_iters=0)
        down = lr_scheduler.LinearLR(optimizer, 1.0, 0.0, total_iters=10)
        chain = lr_scheduler.SequentialLR(optimizer, [warm, stable, down], milestones=[5, 40])
        assert [learning_rate(training, step) for step in range(50)] == pytest.approx(rates_of(chain, 50))

    @given(
        schedule=st.sampled_from(["constant", "cosine", "wsd"]),
        steps=st.integers(1, 300),
        warmup=st.integers(0, 400),
    )
    def test_it_is_positive_and_never_above_what_was_asked_for(self, schedule, steps, warmup):
        training = TrainingConfig(steps=steps, lr=2.0, lr_schedule=schedule, warmup_steps=warmup)
        rates = [learning_rate(training, step) for step in range(steps)]
        assert all(0 < rate <= 2 for rate in rates)
        peak = rates.index(max(rates))
        assert rates[: peak + 1] == sorted(rates[: peak + 1])
        assert rates[peak:] == sorted(rates[peak:], reverse=True)

    @pytest.mark.parametrize("share", [0.0, -0.1, 1.1])
    def test_a_cool_down_is_a_share_of_the_steps(self, share):
        with pytest.raises(UserError, match="training.cooldown must be above 0 and at most 1"):
            TrainingConfig(cooldown=share)


class TestMoreStepsLater:
    """What makes a warm-up, stable, decay schedule worth having: before the cool-down a run can be prolonged."""

    OLD = TrainingConfig(steps=100, lr_schedule="wsd")
    NEW = TrainingConfig(steps=200, lr_schedule="wsd")

    def test_before_the_cool_down(self):
        require_same_learning_rates(self.OLD, self.NEW, step=81)

    def test_after_it_the_error_says_where_to_go_back_to(self):
        with pytest.raises(UserError, match="turn back to a checkpoint of at most 81 steps"):
            require_same_learning_rates(self.OLD, self.NEW, step=82)

    def test_a_cosine_depends_on_all_steps(self):
        old, new = (TrainingConfig(steps=steps, lr_schedule="cosine", warmup_steps=10) for steps in (100, 200))
        require_same_learning_rates(old, new, step=11)
        with pytest.raises(UserError, match="at most 11 steps"):
            require_same_learning_rates(old, new, step=12)

    def test_on_the_command_line(self, run_script, tiny_config_file, tmp_path):
        out = tmp_path / "run"
        flags = ["--training.lr_schedule=wsd", "--training.steps=6", "--training.cooldown=0.6"]
        first = run_script("train.py", "--config", tiny_config_file, "--out", out, *flags, "--training.save_every=3")
        assert first.code == 0, first.err
        refused = run_script("train.py", "--resume", out, "--training.steps=9")
        assert refused.code == 2
        assert "turn back to a checkpoint of at most 3 steps" in refused.err
        back = out / "checkpoints" / "step_0000003.pt"
        outcome = run_script("train.py", "--resume", back, "--training.steps=9")
        assert outcome.code == 0, outcome.err
        assert RunDirectory(out).latest_checkpoint().name == "step_0000009.pt"


class TestMuon:
    NETWORK = {"image_size": 8, "patch_size": 4, "width": 16, "depth": 2, "num_heads": 2, "num_context_tokens": 2}

    def test_hidden_matrices_of_a_transformer(self):
        network = Transformer(**self.NETWORK, num_classes=3)
        optimizers = make_optimizers(TrainingConfig(optimizer="muon"), network)
        names = {id(parameter): name for name, parameter in network.named_parameters()}
        of_muon, of_adamw = (
            {names[id(parameter)] for group in optimizers[kind].param_groups for parameter in group["params"]}
            for kind in ("muon", "optimizer")
        )
        assert of_muon | of_adamw == set(names.values())
        assert not of_muon & of_adamw
        assert {"blocks.0.attention.qkv.weight", "blocks.1.mlp.out.weight"} <= of_muon
        at_the_ends = {"patch_embedding.0.weight", "output.weight", "class_embedding.weight", "context_tokens"}
        assert at_the_ends <= of_adamw

    def test_a_muon_update_is_orthogonal_at_the_size_of_adamw(self):
        """All singular values of an update alike (Jordan et al. 2024), its root mean square 0.2 of the learning rate
        (Liu et al. 2025, eq. 4)."""
        network = Transformer(**self.NETWORK, num_classes=3)
        optimizer = make_optimizers(TrainingConfig(optimizer="muon", lr=0.1), network)["muon"]
        weight = network.blocks[0].attention.out.weight
        before = weight.detach().clone()
        weight.grad = torch.randn(weight.shape, generator=torch.Generator().manual_seed(0))
        optimizer.step()
        update = weight.detach() - before
        singular = torch.linalg.svdvals(update)
        assert singular.max() < 2.5 * singular.min()
        assert update.square().mean().sqrt() == pytest.approx(0.2 * 0.1, rel=0.2)

    def test_the_error_falls(self, tiny_trainer):
        small = ("--model.channel_multipliers=[1]", "--model.attention_resolutions=[]")
        flags = ("--loss=mse", "--model.dropout=0", "--training.optimizer=muon", "--training.lr=3e-3", *small)
        trainer = tiny_trainer(*flags)
        images, classes = trainer.stream.batch(0)
        errors = []
        for _ in range(4):
            for _ in range(15):
                trainer.train_step(images, classes)
            errors.append(trainer.terms.flush(trainer.processes)["mse"])
        assert errors[-1] < 0.5 * errors[0]


def test_betas_and_eps_reach_adamw(tiny_trainer):
    trainer = tiny_trainer("--training.betas=[0.8, 0.95]", "--training.eps=1e-6")
    (group,) = trainer.optimizers["optimizer"].param_groups
    assert (tuple(group["betas"]), group["eps"]) == ((0.8, 0.95), 1e-6)
    with pytest.raises(UserError, match="training.betas"):
        TrainingConfig(betas=(0.9, 1.0))


def test_moments_of_other_parameters_are_refused():
    def stepped(*sizes: int) -> torch.optim.Optimizer:
        parameters = [nn.Parameter(torch.ones(size)) for size in sizes]
        optimizer = torch.optim.AdamW(parameters)
        sum(parameter.sum() for parameter in parameters).backward()
        optimizer.step()
        return optimizer

    state = stepped(2, 3).state_dict()
    set_moments(stepped(2, 3), state)
    for others in (stepped(2), stepped(3, 2)):
        with pytest.raises(ValueError, match="the saved moments"):
            set_moments(others, state)
