"""What tells the foreground of a picture from its background: the seam between the sticker maker and networks."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import numpy as np
from PIL import Image

from improved_diffusion.data.decode import to_rgb
from improved_diffusion.errors import UserError
from improved_diffusion.files import file_sha256

if TYPE_CHECKING:
    import torch

SHIPPED = Path(__file__).parents[2] / "pretrained" / "cutout"
NAMES = ("birefnet", "alpha")
BIREFNET = "birefnet-general"  # rembg's name for the weights


class Matter(Protocol):
    def __call__(self, image: Image.Image) -> np.ndarray:
        """How much of each pixel is foreground.

        Args:
            image: RGB of any size, (W, H); RGBA too where the file has transparency, which `own_alpha` reads.

        Returns:
            float32 (H, W) in [0, 1].
        """


def load_matter(name: str | Path = SHIPPED, device: str | torch.device | None = None) -> Matter:
    """A matter by its name.

    Args:
        name: `birefnet`, or `alpha` for the transparency that a picture has itself, or a cut-out that
            `stickers.py segment train` made: its folder, or the .safetensors file there.
        device: where a cut-out runs; by default a GPU if there is one. rembg chooses for itself where BiRefNet does.

    Raises:
        UserError: there is no such cut-out, what the name needs is not installed or not to be had, or a device that
            cannot be used.
    """
    if str(name) == "alpha":
        return own_alpha
    if str(name) == "birefnet":
        return load_birefnet()
    path = Path(name)
    if not path.exists():
        raise UserError(
            f"there is no cut-out at {path}: give a folder that stickers.py segment train wrote, birefnet, or alpha"
        )
    segment = importlib.import_module("improved_diffusion.stickers.segment")  # torch and transformers take seconds
    network = segment.load_cutout(path, device)
    return lambda image: network(to_rgb(image))


def identity(name: str | Path) -> str:
    """What tells a matter from others: its name, or of a trained cut-out, which `load_matter` has opened, the SHA-256
    of its weights."""
    if str(name) in NAMES:
        return str(name)
    path = Path(name)
    if path.is_dir():  # of a run that is not finished, the latest checkpoint
        path = next(
            iter(sorted(path.glob("*.safetensors")) or sorted(path.glob("checkpoints/*.pt"), reverse=True)), path
        )
    return file_sha256(path)


def own_alpha(image: Image.Image) -> np.ndarray:
    """The transparency of a picture that has some.

    Raises:
        UserError: it has none.
    """
    if image.mode != "RGBA":
        raise UserError("the picture has no transparency of its own to cut along: give another --matting")
    return np.asarray(image.getchannel("A"), np.float32) / 255


def load_birefnet() -> Matter:
    """BiRefNet (Zheng et al. 2024, arXiv:2401.03407; MIT) as the package rembg carries it, for photographs.

    rembg's file is a graph in ONNX, which holds no program; that on the Hugging Face hub is opened by running the
    Python beside it (`trust_remote_code`), which is nothing to do for somebody else.

    Raises:
        UserError: rembg is not installed, or its weights are neither in its folder nor to be had.
    """
    try:
        from rembg import new_session
    except (ImportError, SystemExit) as error:  # it exits where there is no onnxruntime
        raise UserError("--matting birefnet needs the package rembg: pip install 'rembg[cpu]', or [gpu]") from error
    try:
        session = new_session(BIREFNET)
    except Exception as error:  # of a download, or of a damaged file
        reason = " ".join(str(error).split())[:160] or type(error).__name__
        raise UserError(
            f"the weights of BiRefNet are not to be had ({reason}): where there is a network run "
            f"`rembg d {BIREFNET}`, and bring ~/.rembg/models/{BIREFNET}/{BIREFNET}.onnx to the same place here"
        ) from error
    return lambda image: np.asarray(session.predict(to_rgb(image))[0], np.float32) / 255
