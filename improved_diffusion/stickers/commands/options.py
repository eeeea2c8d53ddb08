"""Flags that several commands share, and what they say at their end."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from improved_diffusion.errors import ArgumentParser, UserError
from improved_diffusion.personalize.commands.options import add_model_options, add_scale_options, open_model
from improved_diffusion.stickers.matte import SHIPPED

if TYPE_CHECKING:
    from improved_diffusion.stickers.photos import Outcome
    from improved_diffusion.stickers.restyle import Style

BLIP = "Salesforce/blip-image-captioning-base"  # as personalize.models.judges.BLIP, which a test compares
FORMATS = ("webp", "png")  # as finish.FORMATS, which a test compares
DEVICE = "cpu, cuda, cuda:1 ... (default: cuda if there is one)"


def add_files(parser: ArgumentParser, name: str, what: str) -> None:
    parser.add_argument("photos", nargs="+", type=Path, metavar=name, help=what)
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder of the results")


def add_caption_options(parser: ArgumentParser) -> None:
    add = parser.add_argument
    add("--blip", default=BLIP, help="BLIP model, by name or folder (default: %(default)s)")
    add("--prefix", default="", help="words that each caption starts with (default: none)")


def add_restyle_options(parser: ArgumentParser) -> None:
    add = parser.add_argument
    add(
        "--prompt",
        metavar="TEXT",
        help="{caption} stands for the photograph's, {token} and {class} for the run's subject (default: "
        '"a {token} {class} of {caption}", or "a telegram sticker of {caption}" where there is no subject)',
    )
    add("--strength", type=float, default=0.6, help="0 leaves the photograph, 1 forgets it (default: %(default)s)")
    add("--steps", type=int, default=30, help="sampling steps, of which STRENGTH are taken (default: %(default)s)")
    add("--guidance-scale", type=float, default=7.5, help="classifier-free guidance (default: %(default)s)")
    add("--negative-prompt", default="", help="what the pictures should not be")
    add("--seed", type=int, default=0, help="of the noise, the same for each photograph (default: 0)")
    add_model_options(parser)
    add_scale_options(parser)


def add_cut_options(parser: ArgumentParser) -> None:
    parser.add_argument(
        "--matting",
        default=SHIPPED,
        metavar="NAME",
        help="a folder that segment train wrote, birefnet, or alpha: a picture's own transparency (default: the "
        "cut-out that ships)",
    )


def add_finish_options(parser: ArgumentParser) -> None:
    add = parser.add_argument
    add("--outline", type=int, default=0, metavar="PIXELS", help="width of a white outline (default: none)")
    add("--format", choices=FORMATS, default=FORMATS[0], help="of the stickers (default: %(default)s)")


def open_style(parser: ArgumentParser, options: argparse.Namespace) -> tuple[Style, dict[str, object]]:
    """What draws, as the flags say, and what of it changes its pictures. Raises UserError as `open_model` does."""
    if not 0 <= options.seed < 2**62:
        parser.error(f"--seed must be from 0 to 2^62, not {options.seed}")
    from improved_diffusion.personalize.generate import Sampling
    from improved_diffusion.personalize.models.adapters import set_scales
    from improved_diffusion.personalize.pictures import model_settings
    from improved_diffusion.stickers.restyle import Style

    sampling = Sampling(options.steps, options.guidance_scale, options.negative_prompt, strength=options.strength)
    base, config = open_model(parser, options)
    scales = (options.unet_scale, options.text_encoder_scale, options.text_encoder_2_scale)
    set_scales(base, *scales)
    return Style(base, config, sampling, options.seed, options.prompt), model_settings(base, scales, options.adapter)


def report(outcome: Outcome, out: Path) -> None:
    """Say what was made. Raises UserError, a line with all reasons, where something was refused."""
    print(f"{len(outcome.made)} in {out}")
    require_all(outcome.refused)


def require_all(refused: list[str]) -> None:
    if refused:
        raise UserError("; ".join(refused))
