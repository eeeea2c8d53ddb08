"""Flags that several commands share: which model, and how it draws."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from improved_diffusion.errors import ArgumentParser

if TYPE_CHECKING:
    import torch

    from improved_diffusion.personalize.config import PersonalizeConfig
    from improved_diffusion.personalize.models.base import Base
    from improved_diffusion.personalize.models.stack import Stacked


def add_model_options(parser: ArgumentParser) -> None:
    add = parser.add_argument
    add("--run", type=Path, help="run directory of a tuned model")
    add("--checkpoint", help="of the run: best, latest or step_0000450.pt (default: best, or else latest)")
    add("--base", help="base model, a folder, a .safetensors file or a name on the hub (default: the run's)")
    add("--variant", help="of the base's files, fp16 for one (default: the run's, or none)")
    add("--adapter", type=Path, help="a .safetensors file of LoRA for --base, in diffusers' or kohya's form")
    add("--clip-skip", type=int, help="2 for the layer before the last of the text encoder (default: the run's, or 1)")
    add("--max-token-length", type=int, choices=(75, 150, 225), help="tokens of a prompt (default: the run's, or 75)")
    add("--allow-unknown", action="store_true", help="take of --adapter the layers that the base has, and no others")
    add("--device", help="cpu, cuda, cuda:1 ... (default: cuda if there is one)")
    add("--precision", choices=("float32", "bf16", "fp16"), help="default: float32 on a CPU, else bf16 or fp16")


def add_scale_options(parser: ArgumentParser) -> None:
    add = parser.add_argument
    add("--unet-scale", type=float, default=1.0, help="weight of the UNet's adapter; 0 is the base (default: 1)")
    add("--text-encoder-scale", type=float, default=1.0, help="weight of the text encoder's adapter (default: 1)")
    add("--text-encoder-2-scale", type=float, help="of SDXL's second one (default: as the first)")


def open_model(
    parser: ArgumentParser, options: argparse.Namespace, on_cpu: bool = False
) -> tuple[Base, PersonalizeConfig]:
    """The model that the flags name, on the device that they name unless it is to be left on the CPU, and the settings
    of its run (the defaults, if it comes from none).

    Raises:
        UserError: flags that do not go together, or what `load_run` and `load_adapter` raise.
    """
    from improved_diffusion.personalize.config import PersonalizeConfig
    from improved_diffusion.personalize.models.base import load_base
    from improved_diffusion.personalize.models.tuned import load_adapter, load_run
    from improved_diffusion.run_directory import RunDirectory

    if options.run is None and options.base is None:
        parser.error("which model? give --run, or --base and perhaps --adapter")
    if options.run is not None and options.adapter is not None:
        parser.error("--run has an adapter of its own: give --base with --adapter, or --run alone")
    device, precision = where(options)
    device = "cpu" if on_cpu else device
    if options.run is not None:
        run = RunDirectory(options.run)
        tuned = load_run(run, options.checkpoint, options.base, device, precision, options.variant)
        return _as_asked(tuned.base, options), tuned.config
    base = _as_asked(load_base(options.base, options.variant), options).to(device, precision)
    if options.adapter is not None:
        taken, layers = load_adapter(base, options.adapter, options.allow_unknown)
        print(f"{options.adapter}: {taken} of {layers} layers taken", flush=True)
    return base, PersonalizeConfig()


def open_stack(
    parser: ArgumentParser, options: argparse.Namespace, stack: Sequence[Stacked], on_cpu: bool = False
) -> tuple[Base, PersonalizeConfig]:
    """The base that the flags name, or else that of the first run in the `stack`, with all its adapters, on the device
    or the CPU, and the settings of that run (the defaults, if there is none).

    Raises:
        UserError: flags that do not go together, or what `attach_stack` raises.
    """
    from improved_diffusion.personalize.models.base import load_base
    from improved_diffusion.personalize.models.stack import attach_stack
    from improved_diffusion.personalize.models.tuned import lora_config

    if options.run is not None or options.adapter is not None:
        parser.error("--adapters names all adapters: leave out --run and --adapter")
    if {options.unet_scale, options.text_encoder_scale, options.text_encoder_2_scale} - {1.0, None}:
        parser.error("of --adapters each has its weight behind a colon: leave out the scales")
    first = next((adapter.run for adapter in stack if adapter.run is not None), None)
    if options.base is None and first is None:
        parser.error("which base? --adapters of files alone need --base")
    name, variant = options.base, options.variant
    if name is None:
        config = lora_config(first)
        name, variant = config.base, variant or config.variant
    device, precision = where(options)
    base = load_base(name, variant).to("cpu" if on_cpu else device, precision)
    config = attach_stack(base, stack, options.allow_unknown)
    return _as_asked(replace(base, text=config.text), options), config


def _as_asked(base: Base, options: argparse.Namespace) -> Base:
    """The base, reading texts as the flags say."""
    given = {name: getattr(options, name) for name in ("clip_skip", "max_token_length")}
    said = {name: value for name, value in given.items() if value is not None}
    return replace(base, text=replace(base.text, **said))


def where(options: argparse.Namespace) -> tuple[torch.device, str]:
    """The device, and the arithmetic on it."""
    from improved_diffusion.runtime.devices import drawing_precision, usable_device

    device = usable_device(options.device)
    return device, options.precision or drawing_precision(device)
