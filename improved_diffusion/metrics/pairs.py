"""Distances of aligned pairs: image i is compared with reference i, pixel to pixel. Not for sets without pairs."""

from __future__ import annotations

import itertools
import pickle
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import numpy as np
import torch
from torch import Tensor, nn

from improved_diffusion.errors import UserError
from improved_diffusion.metrics.inception.extractor import full_float32
from improved_diffusion.metrics.similarity import Images, check_images, rgb_arrays

LPIPS_BACKBONES = {"alex": "AlexNet", "vgg": "VGG16", "squeeze": "SqueezeNet 1.1"}


@torch.inference_mode()
def lpips(images: Images, references: Images, network: nn.Module, batch_size: int = 32) -> Tensor:
    """Learned perceptual distance of each pair (LPIPS, version 0.1; Zhang et al. 2018, arXiv:1801.03924).

    Nothing is resized: the distance depends on the image size, so compare only values of one size and one network.
    Published values are mostly AlexNet's.

    Args:
        images, references: N of each; a pair has one size, of at least 31 pixels a side for AlexNet, 16 for VGG16.
        network: takes two float32 (n, 3, H, W) from -1 to 1 and returns n distances: that of `load_lpips`,
            `lpips.LPIPS`, or torchmetrics' `LearnedPerceptualImagePatchSimilarity(...).net`.
        batch_size: pairs per call of the network.

    Returns:
        float32 (N,) on the CPU, 0 for equal images.

    Raises:
        UserError: no pairs, other counts, or a pair of two sizes.
        ValueError: arguments of another kind, or a network in training mode.
    """
    if network.training:
        raise ValueError("the network is in training mode, where dropout changes its output: call eval() before")
    device = next(network.parameters()).device

    def distances(batch: Tensor, reference: Tensor) -> Tensor:
        return network(*(pixels.to(device).float().div(127.5).sub(1) for pixels in (batch, reference))).flatten()

    with full_float32(device):
        return _measure(images, references, batch_size, distances)


@torch.inference_mode()
def ergas(images: Images, references: Images, ratio: float = 4.0, batch_size: int = 32) -> Tensor:
    """Relative dimensionless global error of each pair (ERGAS; Wald 2000, "Quality of high resolution synthesised
    images: is there a simple criterion?").

        100 / ratio * sqrt(mean over channels of (root mean square error / mean of the reference)^2)

    An error relative to the brightness of each channel, in percent if `ratio` is 1: lower is better. It was made for
    satellite images sharpened from a resolution `ratio` times coarser, of which more error is to be expected. It has no
    scale of its own: only values of one `ratio` can be compared.

    Args:
        images, references: N of each; a pair has one size.
        ratio: pixel size of the coarse image over that of the fine one (the inverse of Wald's h/l): the factor of a
            super-resolution. 4 is the default of torchmetrics, which computes the value.
        batch_size: pairs per computation.

    Returns:
        float32 (N,) on the CPU, computed in float64; 0 for equal images.

    Raises:
        UserError: no pairs, other counts, a pair of two sizes, a channel of a reference that is 0 everywhere (the error
            relative to it does not exist), or torchmetrics is not installed.
        ValueError: arguments of another kind, or a ratio that is not positive.
    """
    if not ratio > 0:
        raise ValueError(f"the ratio must be positive, not {ratio}")
    compute = _torchmetrics().functional.image.error_relative_global_dimensionless_synthesis

    def errors(batch: Tensor, reference: Tensor) -> Tensor:
        return compute(batch.double(), reference.double(), ratio=ratio, reduction="none")

    values = _measure(images, references, batch_size, errors)
    if undefined := torch.nonzero(~torch.isfinite(values)).flatten().tolist():
        raise UserError(
            f"ERGAS does not exist for {len(undefined):,} of {len(values):,} pairs, the first at index {undefined[0]}: "
            "a channel of the reference is 0 everywhere"
        )
    return values


def load_lpips(backbone: Path | str, net: str = "alex", device: torch.device | str = "cpu") -> nn.Module:
    """The LPIPS network from torchvision's weights in a local file; nothing is downloaded.

    The linear layers on top, version 0.1, come with torchmetrics. The file is the one that torchvision downloads, such
    as alexnet-owt-7be5be79.pth; of it only the convolutions (`features.*`) are needed.

    Args:
        backbone: a file of torchvision's weights of the ImageNet classifier `net`.
        net: alex, vgg (VGG16) or squeeze (SqueezeNet 1.1).
        device: where the network is to run.

    Returns:
        A network for `lpips`, in evaluation mode.

    Raises:
        UserError: a missing or damaged file, weights of another network, or torchmetrics is not installed.
        ValueError: an unknown `net`.
    """
    if net not in LPIPS_BACKBONES:
        raise ValueError(f"net must be one of {', '.join(LPIPS_BACKBONES)}, not {net!r}")
    _torchmetrics()
    # The public class downloads its backbone when it is made; this one, which it wraps, can leave that to us.
    from torchmetrics.functional.image.lpips import _LPIPS

    try:
        weights = torch.load(backbone, map_location="cpu", weights_only=True)
    except (OSError, EOFError, RuntimeError, pickle.UnpicklingError) as error:
        raise UserError(f"cannot read the weights {backbone}: {error}") from error
    network = _LPIPS(net=net, pnet_rand=True)
    # slice2.3.weight of AlexNet and VGG16, slices.1.3.squeeze.weight of SqueezeNet: the slice is torchmetrics' own.
    names = {name: re.sub(r"^slices?\.?\d+", "features", name) for name in network.net.state_dict()}
    try:
        network.net.load_state_dict({name: weights[theirs] for name, theirs in names.items()})
    except (KeyError, TypeError, RuntimeError) as error:
        raise UserError(f"{backbone} does not hold torchvision's weights of {LPIPS_BACKBONES[net]}") from error
    return network.to(device).eval()


def _measure(
    images: Images, references: Images, batch_size: int, distances: Callable[[Tensor, Tensor], Tensor]
) -> Tensor:
    """float32 (N,): what `distances` says of each pair of uint8 (n, 3, H, W)."""
    return torch.cat([distances(*pair).float().cpu() for pair in _pairs(images, references, batch_size)])


def _pairs(images: Images, references: Images, batch_size: int) -> Iterator[tuple[Tensor, Tensor]]:
    """uint8 (n, 3, H, W) of both, n at most `batch_size`. Neighbours of different sizes are never in one batch."""
    check_images(images)
    check_images(references, "references")
    if batch_size < 1:
        raise ValueError(f"the batch size must be positive, not {batch_size}")
    if len(images) != len(references):
        raise UserError(f"there are {len(images):,} images and {len(references):,} references: these are no pairs")
    sizes = _sizes(images)
    for index, (size, other) in enumerate(zip(sizes, _sizes(references), strict=True)):
        if size != other:
            raise UserError(
                f"image {index} is {size[0]}x{size[1]} and its reference {other[0]}x{other[1]}: "
                "only aligned pairs of one size can be compared"
            )
    for _, group in itertools.groupby(range(len(sizes)), key=sizes.__getitem__):
        indices = list(group)
        for start in range(indices[0], indices[-1] + 1, batch_size):
            part = slice(start, min(start + batch_size, indices[-1] + 1))
            yield _stacked(images[part]), _stacked(references[part])


def _stacked(images: Images) -> Tensor:
    return torch.from_numpy(np.stack(rgb_arrays(images))).permute(0, 3, 1, 2)


def _sizes(images: Images) -> list[tuple[int, int]]:
    """(width, height) of each."""
    if isinstance(images, Tensor | np.ndarray):
        return [(images.shape[2], images.shape[1])] * len(images)
    return [image.size for image in images]


def _torchmetrics() -> ModuleType:
    try:
        import torchmetrics.functional.image
    except ImportError as error:
        raise UserError("this needs torchmetrics: in the checkout, pip install -e '.[similarity]'") from error
    return torchmetrics
