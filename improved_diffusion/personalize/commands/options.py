"""Flags that several commands share: which model, and how it draws."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from improved_diffusion.errors import ArgumentParser

if TYPE_CHECKING:
    from improved_diffusion.personalize.config import PersonalizeConfig
    from improved_diffusion.personalize.models.base import Base


def add_model_options(parser: ArgumentParser) -> None:
    add = parser.add_argument
    add("--run", type=Path, help="run directory of a tuned model")
    add("--checkpoint", help="of the run: best, latest or step_0000450.pt (default: best, or else latest)")
    add("--base", help="base model, a folder or a name on the hub (default: the run's)")
    add("--adapter", type=Path, help="a .safetensors file of LoRA for --base, in diffusers' or kohya's form")
    add("--allow-unknown", action="store_true", help="take of --adapter the layers that the base has, and no others")
    add("--device", help="cpu, cuda, cuda:1 ... (default: cuda if there is one)")
    add("--precision", choices=("float32", "bf16", "fp16"), help="default: float32 on a CPU, else bf16 or fp16")


def add_scale_options(parser: ArgumentParser) -> None:
    add = parser.add_argument
    add("--unet-scale", type=float, default=1.0, help="weight of the UNet's adapter; 0 is the base (default: 1)")
    add("--text-encoder-scale", type=float, default=1.0, help="weight of the text encoder's adapter (default: 1)")
    add("--text-encoder-2-scale", type=float, help="of SDXL's second one (default: as the first)")


def open_model(parser: ArgumentParser, options: argparse.Namespace) -> tuple[Base, PersonalizeConfig]:
    """The model that the flags name, and the settings of its run (the defaults, if it comes from none).

    Raises:
        UserError: flags that do not go together, or what `load_run` and `load_adapter` raise.
    """
    import torch

    from improved_diffusion.personalize.config import PersonalizeConfig
    from improved_diffusion.personalize.models.base import load_base
    from improved_diffusion.personalize.models.tuned import load_adapter, load_run
    from improved_diffusion.run_directory import RunDirectory
    from improved_diffusion.training.devices import drawing_precision, usable_device

    if options.run is None and options.base is None:
        parser.error("which model? give --run, or --base and perhaps --adapter")
    if options.run is not None and options.adapter is not None:
        parser.error("--run has an adapter of its own: give --base with --adapter, or --run alone")
    device = usable_device(options.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    precision = options.precision or drawing_precision(device)
    if options.run is not None:
        tuned = load_run(RunDirectory(options.run), options.checkpoint, options.base, device, precision)
        return tuned.base, tuned.config
    base = load_base(options.base).to(device, precision)
    if options.adapter is not None:
        taken, layers = load_adapter(base, options.adapter, options.allow_unknown)
        print(f"{options.adapter}: {taken} of {layers} layers taken", flush=True)
    return base, PersonalizeConfig()
