"""A trained cut-out: from a run or a file, for pictures of any size."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from improved_diffusion.checkpoint_file import read_checkpoint
from improved_diffusion.errors import UserError
from improved_diffusion.run_directory import RunDirectory, is_run_directory
from improved_diffusion.runtime.devices import usable_device
from improved_diffusion.sampling.model_file import SUFFIX, read_described, write_described
from improved_diffusion.settings import settings_of, to_plain
from improved_diffusion.stickers.segment.config import SegmentConfig
from improved_diffusion.stickers.segment.drawing import HELD_OUT, seeded
from improved_diffusion.stickers.segment.models import CutoutNetwork, build_network, learned, set_learned
from improved_diffusion.stickers.segment.pictures import Photographs
from improved_diffusion.stickers.segment.scenery import background

KIND = "cutout"  # what the description in a file says that it is
FILE = f"cutout{SUFFIX}"  # in a finished run
COMPARED, TOLERANCE = 8, 0.002  # scenes, and by how much half precision may change alpha in the mean


@dataclass(frozen=True, eq=False)
class Cutout:
    """A network that cuts out, with what is known of it. Call it with a picture: RGB, of any size -> its alpha, float32
    (H, W) in [0, 1]."""

    network: CutoutNetwork
    config: SegmentConfig
    images_seen: int = 0
    seconds: float = 0.0
    """Of its training."""
    provenance: list[dict[str, Any]] = field(default_factory=list, repr=False)

    def __call__(self, picture: Image.Image) -> np.ndarray:
        size = self.config.image_size
        scale = size / max(picture.size)
        width, height = (max(1, round(side * scale)) for side in picture.size)
        small = picture.convert("RGB").resize((width, height), Image.Resampling.BICUBIC, reducing_gap=3)
        alpha = self._alpha(np.asarray(small))
        large = Image.fromarray(alpha).resize(picture.size, Image.Resampling.BICUBIC)
        return np.asarray(large).clip(0, 1)

    @torch.inference_mode()
    def _alpha(self, pixels: np.ndarray) -> np.ndarray:
        """uint8 (H, W, 3) -> float32 (H, W), at the scale that the network was trained at. What the sides lack to what
        the network divides, the pixels of the edge fill."""
        height, width, _ = pixels.shape
        lacking = [(0, -side % self.config.model.divisor) for side in (height, width)]
        padded = torch.from_numpy(np.pad(pixels, (*lacking, (0, 0)), mode="edge")).permute(2, 0, 1)[None]
        device = self.network.mean.device
        logits = self.network(padded.to(device, memory_format=torch.channels_last))
        return logits[0, :height, :width].sigmoid().float().cpu().numpy()


def load_cutout(path: str | Path, device: str | torch.device | None = None) -> Cutout:
    """The cut-out at `path`: an exported file, or a folder with one, such as a finished run of `stickers.py segment
    train`; of a run that is not finished the latest checkpoint; or a checkpoint.

    Args:
        path: of the run or the file.
        device: by default a GPU if there is one.

    Raises:
        UserError: nothing there, a damaged file, or something else than a cut-out; a device that cannot be used.
    """
    path, device = Path(path), usable_device(device)
    if path.is_dir():
        path = next(iter(sorted(path.glob(f"*{SUFFIX}"))), path)
    if path.suffix == SUFFIX:
        description, weights = read_described(path)
        if description.get("kind") != KIND:
            raise UserError(f"{path} holds no cut-out: one is made with stickers.py segment export RUN")
        try:
            config = settings_of(SegmentConfig, description["config"], str(path))
            known = {name: description[name] for name in ("images_seen", "seconds", "provenance")}
        except (LookupError, TypeError) as error:
            raise UserError(f"{path} was written by another version of this project ({error})") from error
    else:
        config, known, weights = _from_run(path)
    network = build_network(config.model, config.seed)
    set_learned(network, weights)
    return Cutout(network.to(device).eval(), config, **known)


def _from_run(path: Path) -> tuple[SegmentConfig, dict[str, Any], dict[str, Tensor]]:
    run = RunDirectory(path.parent.parent if path.suffix == ".pt" else path)
    if not is_run_directory(run.path):
        raise UserError(f"{path} is neither a run of stickers.py segment train nor a {SUFFIX} file")
    config = run.read_config(SegmentConfig)
    state = read_checkpoint(path if path.suffix == ".pt" else run.latest_checkpoint(), ("step", "ema"))
    try:
        weights = state["ema"][str(config.training.ema_rate)]
        known = {name: state[name] for name in ("images_seen", "seconds")}
    except LookupError as error:
        raise UserError(f"{path} is damaged, or a run of another kind: it holds no {error}") from error
    return config, {**known, "provenance": run.read_provenance()}, weights


def export(cutout: Cutout, path: Path) -> float:
    """Write `cutout` to a .safetensors file, its weights in half precision (float16), read it back, and compare.

    Returns:
        By how much alpha differs in the mean, over a few drawn scenes.

    Raises:
        UserError: there is a file already, another ending, a disk that cannot be written, or a cut-out that half
            precision would change by more than TOLERANCE; then there is no file.
    """
    if path.suffix != SUFFIX:
        raise UserError(f"{path}: the name must end in {SUFFIX}")
    if path.exists():
        raise UserError(f"{path} exists already: choose another name")
    weights = {name: tensor.detach().cpu().half() for name, tensor in learned(cutout.network).items()}
    description = {
        "kind": KIND,
        "config": to_plain(cutout.config),
        "images_seen": cutout.images_seen,
        "seconds": cutout.seconds,
        "provenance": cutout.provenance,
    }
    write_described(path, description, weights)
    written = load_cutout(path, cutout.network.mean.device)
    scenes = [background(cutout.config.image_size, Photographs(()), seeded(0, HELD_OUT, n)) for n in range(COMPARED)]
    # In the mean: where a sharp edge lies, one pixel says little.
    difference = float(np.mean([np.abs(cutout(scene) - written(scene)).mean() for scene in scenes]))
    if not difference <= TOLERANCE:
        path.unlink()
        changes = f"in half precision alpha differs by {difference:.4f} in the mean"
        raise UserError(f"{changes}, more than {TOLERANCE}: not written")
    return difference
