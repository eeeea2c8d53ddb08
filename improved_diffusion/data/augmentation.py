"""Augmentation that does not leak into what is drawn: the network is told what was done to each image, and in drawing
that nothing was (Karras et al. 2022, arXiv:2206.00364, appendix F.2). For small data sets.

Half of the images are mirrored (as by the paper's code, whose x-flip does not go by the probability); five more
transformations are applied to an image with the same probability, independently of each other. Their nine parameters
are what `models/backbone.py` embeds: mirrored, upside down, size, turned (2), stretched (2), shifted (2); 0 where
nothing is done.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

SIZE = 0.2  # standard deviation of log2 of the size, and of the stretch
SHIFT = 0.125  # standard deviation of the shift, as a share of the image


def draw_parameters(count: int, probability: float, generator: torch.Generator) -> Tensor:
    """What to do to `count` images: float32 (count, 9), on the generator's device."""
    device = generator.device

    def chosen() -> Tensor:
        return (torch.rand(count, generator=generator, device=device) < probability).float()

    def uniform() -> Tensor:
        return torch.rand(count, generator=generator, device=device)

    def normal() -> Tensor:
        return torch.randn(count, generator=generator, device=device)

    mirrored = (uniform() < 0.5).float() * (probability > 0)
    upside_down = (uniform() < 0.5) * chosen()
    size = normal() * chosen()
    angle = (2 * uniform() - 1) * math.pi * chosen()
    direction, stretch = (2 * uniform() - 1) * math.pi, normal() * chosen()
    shifts = torch.stack((normal(), normal())) * chosen()
    turned = torch.stack((angle.cos() - 1, angle.sin()))
    stretched = torch.stack((stretch * direction.cos(), stretch * direction.sin()))
    return torch.stack((mirrored, upside_down, size, *turned, *stretched, *shifts), dim=1)


def augment(images: Tensor, parameters: Tensor) -> Tensor:
    """Do to the images what the parameters say; what comes in from beyond an edge is the image's reflection.

    Flips are exact, the rest is resampled once, bicubically. Images of which nothing is to be done stay as they are.

    Args:
        images: (N, C, H, W), float on [-1, 1]; of RGBA the alpha is straight.
        parameters: (N, 9), from `draw_parameters`.

    Returns:
        (N, C, H, W) on [-1, 1].
    """
    mirrored, upside_down = (column.bool()[:, None, None, None] for column in parameters[:, :2].T)
    images = torch.where(mirrored, images.flip(3), images)
    images = torch.where(upside_down, images.flip(2), images)
    moved = parameters[:, 2:].any(dim=1)
    if images.shape[1] == 4:
        resampled = _straight(_resampled(_premultiplied(images), parameters))
    else:
        resampled = _resampled(images, parameters)
    return torch.where(moved[:, None, None, None], resampled.clamp(-1, 1), images)


def _resampled(images: Tensor, parameters: Tensor) -> Tensor:
    height, width = images.shape[2:]
    half = torch.tensor([width / 2, height / 2, 1.0]).to(images.device)  # grid_sample counts from -1 to 1
    sources = _sources(parameters, height, width) * half / half[:, None]
    grid = F.affine_grid(sources[:, :2].to(images.dtype), list(images.shape), align_corners=False)
    return F.grid_sample(images, grid, mode="bicubic", padding_mode="reflection", align_corners=False)


def _sources(parameters: Tensor, height: int, width: int) -> Tensor:
    """(N, 3, 3): where a point of the result comes from, in pixels from the centre, x to the right and y down.

    An image is enlarged, turned, stretched and shifted, in this order: undone from the last to the first.
    """
    size, turned_cos, turned_sin, stretch_cos, stretch_sin, shift_x, shift_y = parameters[:, 2:].unbind(1)
    stretch = SIZE * torch.hypot(stretch_cos, stretch_sin)
    axis = torch.atan2(stretch_sin, stretch_cos) / 2  # halved: an axis is itself again after half a turn
    cos, sin = axis.cos(), axis.sin()
    unstretched = _rotation(cos, sin) @ _scaling(2**-stretch, 2**stretch) @ _rotation(cos, -sin)
    unturned, smaller = _rotation(turned_cos + 1, -turned_sin), 2 ** (-SIZE * size)
    linear = _scaling(smaller, smaller) @ unturned @ unstretched
    return linear @ _shift(-SHIFT * width * shift_x, -SHIFT * height * shift_y)


def _rotation(cos: Tensor, sin: Tensor) -> Tensor:
    zero, one = torch.zeros_like(cos), torch.ones_like(cos)
    return torch.stack((cos, -sin, zero, sin, cos, zero, zero, zero, one), dim=1).view(-1, 3, 3)


def _scaling(x: Tensor, y: Tensor) -> Tensor:
    return torch.diag_embed(torch.stack((x, y, torch.ones_like(x)), dim=1))


def _shift(x: Tensor, y: Tensor) -> Tensor:
    zero, one = torch.zeros_like(x), torch.ones_like(x)
    return torch.stack((one, zero, x, zero, one, y, zero, zero, one), dim=1).view(-1, 3, 3)


def _premultiplied(images: Tensor) -> Tensor:
    """RGBA with colours times alpha, so that what hides under transparent pixels does not bleed into the edges."""
    alpha = (images[:, 3:] + 1) / 2
    return torch.cat(((images[:, :3] + 1) * alpha - 1, images[:, 3:]), dim=1)


def _straight(images: Tensor) -> Tensor:
    """The inverse of `_premultiplied`; black where nothing is to be seen."""
    alpha = (images[:, 3:] + 1) / 2
    colours = (images[:, :3] + 1) / alpha.clamp(min=1 / 255) - 1
    return torch.cat((torch.where(alpha < 0.5 / 255, -1.0, colours), images[:, 3:]), dim=1)
