"""Images of the subject's class, which the base draws before it is tuned (Ruiz et al. 2022, section 3.2)."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from pathlib import Path

from improved_diffusion.cache import cache_directory
from improved_diffusion.errors import UserError
from improved_diffusion.personalize.config import PersonalizeConfig, TextConfig
from improved_diffusion.personalize.data.captioned import CaptionedSet, open_captioned_set
from improved_diffusion.personalize.generate import Sampling
from improved_diffusion.personalize.models.base import Base
from improved_diffusion.personalize.pictures import draw_missing
from improved_diffusion.results import claim

DESCRIPTION = "prior.json"


def prior_images(
    base: Base, fingerprint: str, config: PersonalizeConfig, resolution: int, batch_size: int = 4
) -> CaptionedSet:
    """The first `prior.images` images of the folder of the prior; those that are missing are drawn.

    Image number i is drawn from seed `config.seed + i`, so that an interrupted run goes on where it stopped. A folder
    of one's own, which has no prior.json, is taken as it is.

    Args:
        base: draws them.
        fingerprint: of the base, by which another one's images are told.
        config: of the run, or of one of its concepts.
        resolution: pixels a side.
        batch_size: images at once.

    Raises:
        UserError: the folder holds a prior drawn with other settings, or too few images of one's own.
    """
    prior = config.prior
    settings = {
        "base": fingerprint,
        "prompt": config.subject.fill(prior.prompt),
        "seed": config.seed,
        "steps": prior.steps,
        "guidance_scale": prior.guidance_scale,
        "resolution": resolution,
    }
    text = None  # as older descriptions are, which do not tell
    if config.text != TextConfig():
        text = settings["text"] = dataclasses.asdict(config.text)
    if config.training.vae_tiling:
        settings["vae_tiling"] = True
    name = hashlib.sha256(json.dumps(settings).encode()).hexdigest()[:16]
    folder = Path(prior.path) if prior.path else cache_directory() / "prior" / name
    description = folder / DESCRIPTION
    if folder.is_dir() and any(folder.iterdir()) and not description.is_file():
        own = open_captioned_set(folder, background=config.images.background)
        if len(own) < prior.images:
            raise UserError(f"prior.images is {prior.images} and {folder} holds {len(own)}: lower it, or add images")
        return CaptionedSet(own.path, own.images[: prior.images], own.skipped)
    advice = f"choose another prior.path, or remove {folder} to draw the prior anew"
    claim(description, {**settings, "text": text}, advice)
    files = [folder / f"{number:05d}.png" for number in range(prior.images)]
    seeds = [config.seed + number for number in range(prior.images)]
    sampling = Sampling(prior.steps, prior.guidance_scale, height=resolution, width=resolution)
    prompts = [settings["prompt"]] * prior.images
    draw_missing(base, files, prompts, seeds, sampling, batch_size, description="drawing the prior")
    drawn = open_captioned_set(folder)
    if damaged := [line for line in drawn.skipped if not line.startswith(DESCRIPTION)]:
        raise UserError(f"of the prior in {folder} {damaged[0]}: remove the file, and it is drawn anew")
    return CaptionedSet(folder, drawn.images[: prior.images], ())
