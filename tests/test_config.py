from __future__ import annotations

from pathlib import Path

import pytest

from improved_diffusion.config import Config, DiffusionConfig
from improved_diffusion.config_file import load_config
from improved_diffusion.errors import UserError
from improved_diffusion.settings import parse_arguments, settings_parser, to_settings

CONFIGS = sorted((Path(__file__).parent.parent / "configs").glob("*.yaml"))
OF_TRAIN = ("food101", "demo", "cifar10")  # the others are of personalize.py
PIXEL = [file for file in CONFIGS if file.stem.startswith(OF_TRAIN)]


@pytest.mark.parametrize("file", PIXEL, ids=lambda file: file.stem)
def test_every_config_that_ships_can_be_loaded(file):
    assert load_config(file).training.steps > 0


@pytest.mark.parametrize("loss", ["mse", "hybrid"])
def test_the_replication_configs_are_the_reference_experiment(loss):
    config = load_config(next(file for file in CONFIGS if file.stem == f"food101_{loss}"))
    model, diffusion, training = config.model, config.diffusion, config.training
    assert config.loss == loss
    assert (model.num_channels, model.channel_multipliers, model.num_res_blocks) == (128, (1, 2, 3, 4), 2)
    assert (model.num_heads, model.attention_resolutions, model.dropout) == (4, (16, 8), 0)
    assert (diffusion.timesteps, diffusion.schedule, diffusion.prediction) == (200, "cosine", "eps")
    assert diffusion.variance == ("learned_range" if loss == "hybrid" else "fixed_large")
    assert (training.batch_size, training.lr, training.steps, training.flip) == (64, 1e-4, 90_000, False)
    assert training.grad_clip is None
    assert (config.evaluation.every, config.evaluation.features, config.evaluation.samples_per_class) == (
        15_000,
        64,
        20,
    )


def test_defaults_follow_the_loss():
    mse, hybrid, vlb = (Config(loss=loss).diffusion for loss in ("mse", "hybrid", "vlb"))
    assert (mse.variance, hybrid.variance, vlb.variance) == ("fixed_large", "learned_range", "learned_range")
    assert vlb.timestep_sampler == "loss_second_moment"
    assert mse.timestep_sampler == hybrid.timestep_sampler == "uniform"
    assert hybrid.vlb_weight == 1.0  # T / 1000
    assert Config(diffusion=DiffusionConfig(timesteps=200)).diffusion.vlb_weight == 0.2


def test_flags_override_the_file_which_overrides_the_defaults():
    parser = settings_parser(Config)
    file = {"training": {"lr": 3e-4, "steps": 7}}
    config = to_settings(Config, parser, parse_arguments(parser, ["--training.steps=9"], file, "file"))
    assert (config.training.lr, config.training.steps, config.training.batch_size) == (3e-4, 9, 64)


@pytest.mark.parametrize(
    "flags",
    [
        ["--loss=hybrid", "--diffusion.timesteps=null"],
        ["--loss=mse", "--diffusion.schedule=flow"],
        ["--loss=mse", "--diffusion.prediction=edm"],
        ["--loss=mse", "--diffusion.timesteps=null", "--diffusion.schedule=flow"],  # and eps
        ["--loss=mse", "--diffusion.weighting=min_snr", "--diffusion.loss_space=v"],
        ["--loss=vlb", "--diffusion.weighting=min_snr"],
        ["--loss=hybrid", "--sampling.sampler=heun"],
        ["--sampling.options.eta=0.5"],  # of ancestral
        ["--sampling.sampler=ddim", "--sampling.options.eta=2"],
        ["--sampling.guidance_interval=[3, 1]", "--model.class_dropout=0.1"],
        ["--loss=hybrid", "--diffusion.variance=fixed_large"],
        ["--loss=hybrid", "--diffusion.vlb_weight=0"],
        ["--loss=mse", "--diffusion.timestep_sampler=loss_second_moment"],
        ["--training.ema_rates=[1.0]"],
        ["--model.class_conditional=false", "--model.class_dropout=0.1"],
    ],
    ids=str,
)
def test_settings_that_contradict_each_other(flags):
    parser = settings_parser(Config)
    with pytest.raises(UserError):
        to_settings(Config, parser, parse_arguments(parser, flags))


def test_what_is_added_to_one_parser_is_in_no_other():
    one, other = settings_parser(Config, prog="one"), settings_parser(Config, prog="other")
    one.add_argument("--where")
    assert one.format_usage().startswith("usage: one [")
    assert other.format_usage().startswith("usage: other [")
    assert parse_arguments(one, ["--where=here", "--seed=3"]).where == "here"
    with pytest.raises(UserError, match="--where"):
        parse_arguments(other, ["--where=here"])


def test_a_file_that_has_changed_is_read_again(tmp_path):
    for loss in ("mse", "vlb", "mse"):
        (tmp_path / "config.yaml").write_text(f"loss: {loss}")
        assert load_config(tmp_path / "config.yaml").loss == loss
