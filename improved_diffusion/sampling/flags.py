"""The flags by which sample.py, fid.py and the export change how a run's images are drawn. Their names, choices and
meanings are those of the settings."""

from __future__ import annotations

import argparse
import typing
from pathlib import Path
from typing import Any

from improved_diffusion.config import SAMPLER_OPTIONS, SamplingConfig
from improved_diffusion.errors import UserError

EMA_LENGTH_HELP = "average of the weights of this relative length, made of those kept by training.ema_lengths"


def add_sampling_flags(parser: argparse.ArgumentParser, *, with_guide: bool = True) -> None:
    """--sampler, --sampling-steps, --spacing, --sampling.options, --guidance-scale, --guidance-interval, --noise and,
    which is no setting, --guide."""
    of = " and ".join(f"{', '.join(names)} of {sampler}" for sampler, names in SAMPLER_OPTIONS.items() if names)
    add = parser.add_argument_group("of the images of a run", "by default as the run's own settings say").add_argument
    add("--sampler", choices=tuple(SAMPLER_OPTIONS))
    add("--sampling-steps", type=int, metavar="N", help="heun takes two network evaluations in each, others one")
    add("--spacing", choices=_choices("spacing"), help="of the steps over the noise levels")
    add("--sampling.options", dest="sampler_options", nargs="+", type=sampler_option, metavar="NAME=VALUE", help=of)
    add("--guidance-scale", type=float, metavar="W", help="1 is none")
    add(
        "--guidance-interval",
        nargs=2,
        type=float,
        metavar=("LO", "HI"),
        help="noise levels (sigma / signal) between which there is guidance",
    )
    if with_guide:
        worse = "be guided by this worse model, smaller or less trained, instead of by the same one without the class"
        add("--guide", metavar="RUN[:CHECKPOINT]", help=worse)
    noises = typing.get_args(typing.get_type_hints(SamplingConfig)["noise"])
    add("--noise", choices=noises, help="drawn by numpy, or on the device by Philox: other images, faster on a GPU")


def flag_changes(flags: argparse.Namespace) -> dict[str, Any]:
    """The settings that the flags give, as `change_sampling` takes them; None where a flag is not given."""
    return {
        "sampler": flags.sampler,
        "steps": flags.sampling_steps,
        "spacing": flags.spacing,
        "options": None if flags.sampler_options is None else dict(flags.sampler_options),
        "guidance_scale": flags.guidance_scale,
        "guidance_interval": flags.guidance_interval,
        "noise": flags.noise,
    }


def split_guide(guide: str) -> tuple[str, str | None]:
    """RUN[:CHECKPOINT] as its two parts."""
    run, colon, checkpoint = guide.rpartition(":")
    return (run, checkpoint) if colon and not Path(guide).exists() else (guide, None)


def _choices(setting: str) -> tuple[str, ...]:
    literal, _ = typing.get_args(typing.get_type_hints(SamplingConfig)[setting])  # and None
    return typing.get_args(literal)


def sampler_option(text: str) -> tuple[str, float]:
    """NAME=VALUE as its two parts.

    Raises:
        UserError: it is none, or the value is no number.
    """
    name, equals, value = text.partition("=")
    try:
        return name, float(value)
    except ValueError:
        raise UserError(f"an option of a sampler is NAME=VALUE with a number, such as eta=0.5, not {text!r}") from None
