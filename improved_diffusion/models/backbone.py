"""What every network is: the call that the diffusion makes of it, its settings, and how it is told time and class."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from improved_diffusion.models.autocast import without_autocast

AUGMENTATION_PARAMETERS = 9  # of data/augmentation.py


class Backbone(nn.Module, ABC):
    """Predicts, from noisy images, what the diffusion's loss asks for (eps, x_0, v, ...), and maybe a variance.

    A subclass says how in `forward`, which it starts with `check_inputs`, and names its `hidden_parts`. The settings
    that all have:

    image_size      height and width in pixels: one number for square images, or (height, width)
    in_channels     channels of the images: 1 (grey), 3 (RGB), 4 (RGBA)
    out_channels    `in_channels`, the default, or twice as many where the second half parametrises a learned variance
    num_classes     number of classes, or None for a model that takes no `y`
    null_class      have a further embedding row, `y == num_classes`, that stands for "no class": what
                    classifier-free guidance needs (Ho & Salimans 2022, arXiv:2207.12598)
    augmented       be told how each image was augmented, in AUGMENTATION_PARAMETERS numbers

    What a subclass chooses: `time_channels`, of the sinusoidal embedding of the noise level, even; and
    `embedding_channels`, of the embedding of level and class.

    Raises ValueError for settings that do not fit together.
    """

    def __init__(
        self,
        *,
        image_size: int | tuple[int, int],
        in_channels: int,
        out_channels: int | None,
        num_classes: int | None,
        null_class: bool,
        augmented: bool,
        time_channels: int,
        embedding_channels: int,
    ):
        super().__init__()
        if in_channels < 1:
            raise ValueError(f"in_channels is {in_channels}; it must be at least 1")
        if out_channels not in (None, in_channels, 2 * in_channels):
            allowed = f"{in_channels}, or {2 * in_channels} with a learned variance"
            raise ValueError(f"out_channels is {out_channels}; it must be {allowed}")
        if num_classes is not None and num_classes < 1:
            raise ValueError(f"num_classes is {num_classes}; it must be at least 1, or None for no classes")
        if null_class and num_classes is None:
            raise ValueError("null_class stands beside classes: it needs num_classes")
        self.image_size = image_size
        self.in_channels = in_channels
        self.out_channels = out_channels or in_channels
        self.num_classes = num_classes
        self.null_class = null_class
        self.time_channels = time_channels
        self.gradient_checkpointing = False  # whether training computes blocks anew in the backward pass

        self.time_embedding = nn.Sequential(
            nn.Linear(time_channels, embedding_channels), nn.SiLU(), nn.Linear(embedding_channels, embedding_channels)
        )
        if num_classes is not None:
            self.class_embedding = nn.Embedding(num_classes + null_class, embedding_channels)
        if augmented:
            self.augmentation_embedding = nn.Linear(AUGMENTATION_PARAMETERS, embedding_channels, bias=False)

    def hidden_matrices(self) -> list[Tensor]:
        """The matrices between the first layer and the last: what Muon is for."""
        layers = (layer for part in self.hidden_parts() for layer in part.modules())
        return [layer.weight for layer in layers if isinstance(layer, nn.Linear)]

    @abstractmethod
    def hidden_parts(self) -> Sequence[nn.Module]:
        """The modules between the first layer and the last."""

    @abstractmethod
    def forward(self, x_t: Tensor, t: Tensor, y: Tensor | None = None, augmentation: Tensor | None = None) -> Tensor:
        """Run the network: the one call that denoisers make.

        `x_t`: (N, in_channels, height, width), float in about [-1, 1]. `t`: (N,), what the network is told of the
        noise level, such as the timestep, integer or fractional. `y`: (N,) int64 class indices; given exactly when the
        model has classes. Who trains for guidance draws which labels to drop and passes `num_classes` for them.
        `augmentation`: (N, AUGMENTATION_PARAMETERS), how the images were augmented, 0 where they were not; None for
        images as they are.
        Returns float32 (N, out_channels, height, width) under any autocast.
        Raises ValueError for shapes that do not fit, and for a `y` missing or out of place.
        """

    def run_block(self, block: Callable[..., Tensor], *inputs: Tensor) -> Tensor:
        """`block(*inputs)`. With `gradient_checkpointing` only its inputs are kept for the backward pass, and it is
        computed a second time there, with the dropout of the first (Chen et al. 2016, arXiv:1604.06174).
        """
        if self.gradient_checkpointing and torch.is_grad_enabled():
            return checkpoint(block, *inputs, use_reentrant=False)
        return block(*inputs)

    def embed(self, t: Tensor, y: Tensor | None, augmentation: Tensor | None = None) -> Tensor:
        """Noise level, class and augmentation as float32 (N, embedding_channels) under any autocast.

        A further condition would enter here, as one more term.
        """
        with without_autocast(t.device):
            embedding = self.time_embedding(sinusoidal_embedding(t, self.time_channels))
            if y is not None:
                embedding = embedding + self.class_embedding(y)
            if augmentation is not None:
                embedding = embedding + self.augmentation_embedding(augmentation)
            return embedding

    def check_inputs(self, x_t: Tensor, t: Tensor, y: Tensor | None) -> None:
        """Raise ValueError, in one sentence, unless `forward` can take these."""
        kind, n = type(self).__name__, x_t.shape[0]
        height, width = sides(self.image_size)
        if x_t.shape[1:] != (self.in_channels, height, width):
            raise ValueError(f"x_t is {tuple(x_t.shape)}; this {kind} takes (N, {self.in_channels}, {height}, {width})")
        if t.shape != (n,):
            raise ValueError(f"t is {tuple(t.shape)}; it must be ({n},): one noise level per image")
        if y is None and self.num_classes is not None:
            raise ValueError(f"y is missing: this {kind} is conditional on {self.num_classes} classes")
        if y is not None and self.num_classes is None:
            raise ValueError(f"y was given, but this {kind} has no classes")
        if y is not None and y.shape != (n,):
            raise ValueError(f"y is {tuple(y.shape)}; it must be ({n},): one class per image")


def sides(image_size: int | tuple[int, int]) -> tuple[int, int]:
    """Height and width in pixels."""
    return (image_size, image_size) if isinstance(image_size, int) else image_size


def check_sides(image_size: int | tuple[int, int], divisor: int, reason: str) -> None:
    """Raise ValueError unless `divisor` divides height and width; `reason` says where it comes from."""
    if any(side < 1 or side % divisor for side in sides(image_size)):
        shown = image_size if isinstance(image_size, int) else "x".join(map(str, image_size))
        raise ValueError(f"image_size is {shown}; {reason} it must be divisible by {divisor}")


def sinusoidal_embedding(t: Tensor, dim: int, max_period: float = 10_000.0) -> Tensor:
    """Embed timesteps as cosines, then sines, of geometrically spaced frequencies (Vaswani et al. 2017, section 3.5).

    `t`: (N,), integers or fractions. Returns float32 (N, dim); `dim` is even.
    """
    half = dim // 2
    frequencies = torch.exp(-math.log(max_period) / half * torch.arange(half, dtype=torch.float32, device=t.device))
    angles = t.float()[:, None] * frequencies  # (N, dim / 2)
    return torch.cat([angles.cos(), angles.sin()], dim=1)


def zero_init(layer: nn.Module) -> nn.Module:
    """Zero the parameters of `layer`, so that the residual branch which it ends starts as the identity."""
    for parameter in layer.parameters():
        nn.init.zeros_(parameter)
    return layer
