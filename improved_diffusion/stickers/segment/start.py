"""From settings to a run: the pictures, the network, and everything put together."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from improved_diffusion.provenance import provenance_entry
from improved_diffusion.run_directory import RunDirectory
from improved_diffusion.settings import require
from improved_diffusion.stickers.segment.config import SegmentConfig
from improved_diffusion.stickers.segment.cutout import Cutout
from improved_diffusion.stickers.segment.drawing import TrainingPictures
from improved_diffusion.stickers.segment.evaluation import draw_held_out, measure_all, sheet
from improved_diffusion.stickers.segment.loop import Look, SegmentLoop
from improved_diffusion.stickers.segment.models import CutoutNetwork
from improved_diffusion.stickers.segment.pictures import Photographs, Picture, Pictures, joined, open_pictures
from improved_diffusion.stickers.segment.trainer import Trainer

TRAINING_STATE = ("step", "images_seen", "seconds", "model", "ema", "optimizer", "running_means", "data_hash")
PACKAGES = ("torch", "transformers", "numpy", "pillow")
LOOKED_AT = 64  # held-out pictures

# What a resumed run may change; all else decides what the run computes.
CHANGEABLE = {
    "": ("data",),
    "training": ("steps", "cooldown", "workers", "log_every", "save_every", "keep_checkpoints", "evaluate_every"),
}


def build(config: SegmentConfig, run: RunDirectory, state: dict[str, Any] | None, device: torch.device) -> SegmentLoop:
    """All that a run needs, ready for its first update, or to go on from `state`. Prints what was found on the way.

    Raises:
        UserError: anything that is wrong with the settings, the pictures or the state.
    """
    require(bool(config.data), "which pictures? give --data, folders or zip files of pictures with alpha")
    pictures = joined([open_pictures(path) for path in config.data])
    _say_what_was_skipped(pictures)
    require(
        state is None or state["data_hash"] == pictures.content_hash,
        f"{pictures.path} does not hold the pictures that {run.path} was trained on",
    )
    photographs = Photographs(config.backgrounds)
    training, held_out = pictures.split(config.held_out)
    print(
        f"pictures: {len(training):,} to train on, {len(held_out):,} names held out; {len(photographs):,} photographs"
    )
    trainer = Trainer(config, device, new=state is None)
    print(f"network: {sum(p.numel() for p in trainer.network.parameters()) / 1e6:.2f} M parameters", flush=True)
    data = {"path": pictures.path, "pictures": len(pictures), "content_hash": pictures.content_hash}
    run.write_config(config, [*run.read_provenance(), provenance_entry(data, device, 1, PACKAGES)])
    if state is not None:
        trainer.load_state_dict(state)
    drawn = TrainingPictures(training, photographs, config.image_size, config.seed)
    return SegmentLoop(trainer, drawn, pictures.content_hash, _look(config, held_out, photographs), run)


def _say_what_was_skipped(pictures: Pictures) -> None:
    for line in pictures.skipped:
        print(f"skipped {line}")


def _look(config: SegmentConfig, held_out: tuple[Picture, ...], photographs: Photographs) -> Look:
    """At a few held-out pictures: what their IoU is, and a sheet of some of them."""
    drawn = draw_held_out(held_out, photographs, LOOKED_AT, config.image_size, config.seed)

    def look(network: CutoutNetwork) -> tuple[dict[str, Any], np.ndarray]:
        cutout = Cutout(network.eval(), config)
        means = {name: float(values.mean()) for name, values in measure_all(cutout, drawn).items()}
        shown = sheet({config.model.kind: cutout}, {"held out": drawn})
        record = {"metric": "IoU", "value": means["IoU"], "scores": means, "pictures": len(drawn)}
        return record, shown

    return look
