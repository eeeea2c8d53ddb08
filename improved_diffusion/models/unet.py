"""The UNet of Improved DDPM (Nichol & Dhariwal 2021, arXiv:2102.09672, appendix A).

Going down, each resolution has `num_res_blocks` residual blocks, then a stride-2 convolution to the next. Going up,
each has one block more, so that every feature map of the way down is consumed once as a skip. Self-attention follows
the residual blocks at chosen feature-map sizes, and sits in the middle. Time, and class if there is one, enter each
residual block as the scale and shift of its second GroupNorm. With `patch_size` 2 or 4 all this is of patches: space
goes into channels before the first convolution, and comes back after the last.

Memory format is the caller's choice and survives every block: a model and an input in `torch.channels_last` are the
fast way under bfloat16 autocast.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from improved_diffusion.models.backbone import Backbone, check_sides, sides, zero_init
from improved_diffusion.models.group_norm import GroupNorm

# Positions up to which the matrix of attention weights is made explicitly in bfloat16 on a CPU: half the time of
# PyTorch's kernel there, forwards and backwards together.
EXPLICIT_ATTENTION = 1024


class ResBlock(nn.Module):
    """norm, SiLU, conv; norm that the embedding scales and shifts, SiLU, dropout, conv; added to the input.

    The last convolution starts at zero.
    """

    def __init__(self, in_channels: int, out_channels: int, embedding_channels: int, dropout: float):
        super().__init__()
        self.norm1 = GroupNorm(in_channels)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.scale_shift = nn.Linear(embedding_channels, 2 * out_channels)
        self.norm2 = GroupNorm(out_channels)
        self.dropout = nn.Dropout(dropout)
        self.conv2 = zero_init(nn.Conv2d(out_channels, out_channels, 3, padding=1))
        self.skip = nn.Identity() if in_channels == out_channels else nn.Conv2d(in_channels, out_channels, 1)

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        """`x`: (N, in_channels, H, W). `embedding`: (N, embedding_channels). Returns (N, out_channels, H, W)."""
        h = self.conv1(self.norm1(x, silu=True))
        scale, shift = self.scale_shift(embedding).chunk(2, dim=1)
        h = self.norm2(h, scale, shift, silu=True)
        return self.conv2(self.dropout(h)).add_(self.skip(x))


class Attention(nn.Module):
    """Multi-head self-attention over the positions of a feature map, added to its input; the identity at first."""

    def __init__(self, channels: int, num_heads: int):
        super().__init__()
        self.num_heads = num_heads
        self.norm = GroupNorm(channels)
        self.qkv = nn.Linear(channels, 3 * channels)
        self.out = zero_init(nn.Linear(channels, channels))

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) -> (N, C, H, W)"""
        n, c, h, w = x.shape
        tokens = self.norm(x).permute(0, 2, 3, 1).reshape(n, h * w, c)  # a view where x is channels_last
        qkv = self.qkv(tokens).reshape(n, h * w, self.num_heads, 3, c // self.num_heads)
        tokens = self.out(attend(qkv).reshape(n, h * w, c))
        return x + tokens.reshape(n, h, w, c).permute(0, 3, 1, 2)


def attend(qkv: Tensor) -> Tensor:
    """Scaled dot-product attention: (N, positions, heads, 3, channels) -> (N, positions, heads, channels)."""
    q, k, v = qkv.permute(3, 0, 2, 1, 4)  # each (N, heads, positions, channels)
    if qkv.device.type == "cpu" and qkv.dtype == torch.bfloat16 and qkv.shape[1] <= EXPLICIT_ATTENTION:
        weights = torch.softmax(q * q.shape[-1] ** -0.5 @ k.transpose(-1, -2), dim=-1)
        return (weights @ v).transpose(1, 2)
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2)


class Downsample(nn.Module):
    """Halve height and width with a stride-2 convolution."""

    def __init__(self, channels: int):
        super().__init__()
        self.strided_conv = nn.Conv2d(channels, channels, 3, stride=2, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.strided_conv(x)


class Upsample(nn.Module):
    """Double height and width by repeating pixels, then convolve."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.interpolate(x, scale_factor=2, mode="nearest"))


class Stage(nn.ModuleList):
    """Layers applied in turn, after a skip has joined the channels; residual blocks take the embedding too."""

    def forward(self, x: Tensor, embedding: Tensor, skip: Tensor | None = None) -> Tensor:
        if skip is not None:
            x = torch.cat([x, skip], dim=1)
        for layer in self:
            x = layer(x, embedding) if isinstance(layer, ResBlock) else layer(x)
        return x


class UNet(Backbone):
    """A `Backbone` of convolutions, with attention at chosen sizes.

    num_channels            channels at full resolution; even
    channel_multipliers     channels of each level, in units of `num_channels`; each level halves the feature map
    num_res_blocks          residual blocks of each level on the way down; one more on the way up
    attention_resolutions   feature-map sizes (pixels a side, not downsampling factors) that have attention; of maps
                            that are not square, the shorter side
    num_heads               heads of every attention layer; divides its channels
    patch_size              1, 2 or 4: what the network sees as one pixel is a patch of so many a side, its pixels
                            side by side as channels. Feature maps are counted in patches: with 2, the first level of
                            a 64x64 image is 32x32
    dropout                 probability of dropping a feature before a block's last convolution, in training

    The other settings are those of every `Backbone`; height and width are divisible by patch_size * 2 ** (levels - 1).
    Raises ValueError for settings that do not fit together.
    """

    def __init__(
        self,
        *,
        image_size: int | tuple[int, int],
        in_channels: int = 3,
        out_channels: int | None = None,
        patch_size: int = 1,
        num_channels: int = 128,
        channel_multipliers: tuple[int, ...] = (1, 2, 3, 4),
        num_res_blocks: int = 2,
        attention_resolutions: tuple[int, ...] = (16, 8),
        num_heads: int = 4,
        dropout: float = 0.0,
        num_classes: int | None = None,
        null_class: bool = False,
        augmented: bool = False,
    ):
        check_geometry(image_size, patch_size, num_channels, channel_multipliers, attention_resolutions, num_heads)
        if num_res_blocks < 1:
            raise ValueError(f"num_res_blocks is {num_res_blocks}; it must be at least 1")
        embedding_channels = 4 * num_channels
        super().__init__(
            image_size=image_size,
            in_channels=in_channels,
            out_channels=out_channels,
            num_classes=num_classes,
            null_class=null_class,
            augmented=augmented,
            time_channels=num_channels,
            embedding_channels=embedding_channels,
        )
        self.num_channels = num_channels
        self.patch_size = patch_size

        def block(in_channels: int, out_channels: int) -> ResBlock:
            return ResBlock(in_channels, out_channels, embedding_channels, dropout)

        channels = num_channels
        self.encoder = nn.ModuleList([Stage([nn.Conv2d(in_channels * patch_size**2, channels, 3, padding=1)])])
        skip_channels = [channels]
        sizes = feature_map_sizes(image_size, patch_size, len(channel_multipliers))
        levels = [(size, m * num_channels) for size, m in zip(sizes, channel_multipliers, strict=True)]
        for size, level_channels in levels:
            if size < sizes[0]:
                self.encoder.append(Stage([Downsample(channels)]))
                skip_channels.append(channels)
            for _ in range(num_res_blocks):
                stage = Stage([block(channels, level_channels)])
                channels = level_channels
                if size in attention_resolutions:
                    stage.append(Attention(channels, num_heads))
                self.encoder.append(stage)
                skip_channels.append(channels)

        self.middle = Stage([block(channels, channels), Attention(channels, num_heads), block(channels, channels)])

        self.decoder = nn.ModuleList()
        for size, level_channels in reversed(levels):
            for _ in range(num_res_blocks + 1):
                stage = Stage([block(channels + skip_channels.pop(), level_channels)])
                channels = level_channels
                if size in attention_resolutions:
                    stage.append(Attention(channels, num_heads))
                self.decoder.append(stage)
            if size < sizes[0]:
                stage.append(Upsample(channels))

        self.output_norm = GroupNorm(channels)
        self.output_conv = zero_init(nn.Conv2d(channels, self.out_channels * patch_size**2, 3, padding=1))

    def hidden_parts(self) -> list[nn.Module]:
        return [self.encoder, self.middle, self.decoder]

    def forward(self, x_t: Tensor, t: Tensor, y: Tensor | None = None, augmentation: Tensor | None = None) -> Tensor:
        """Run the network: see `Backbone.forward`."""
        self.check_inputs(x_t, t, y)
        embedding = F.silu(self.embed(t, y, augmentation))  # once here rather than in every block

        h = F.pixel_unshuffle(x_t, self.patch_size)
        skips = []
        for stage in self.encoder:
            h = self.run_block(stage, h, embedding)
            skips.append(h)
        h = self.run_block(self.middle, h, embedding)
        for stage in self.decoder:
            h = self.run_block(stage, h, embedding, skips.pop())
        h = self.output_conv(self.output_norm(h, silu=True))
        return F.pixel_shuffle(h, self.patch_size).float()


def feature_map_sizes(image_size: int | tuple[int, int], patch_size: int, levels: int) -> list[int]:
    """The shorter side of the feature maps of each level."""
    return [min(sides(image_size)) // patch_size >> level for level in range(levels)]


def check_geometry(
    image_size: int | tuple[int, int],
    patch_size: int,
    num_channels: int,
    channel_multipliers: tuple[int, ...],
    attention_resolutions: tuple[int, ...],
    num_heads: int,
) -> None:
    """Raise ValueError, in one sentence, where these settings of a `UNet` do not fit together."""
    if not channel_multipliers or min(channel_multipliers) < 1:
        raise ValueError(f"channel_multipliers is {channel_multipliers or 'empty'}; it must be integers of at least 1")
    if num_channels < 2 or num_channels % 2:
        raise ValueError(f"num_channels is {num_channels}; it must be even: time is embedded as cosines and sines")
    if num_heads < 1:
        raise ValueError(f"num_heads is {num_heads}; it must be at least 1")
    if patch_size not in (1, 2, 4):
        raise ValueError(f"patch_size is {patch_size}; it must be 1, 2 or 4")
    levels = len(channel_multipliers)
    on_patches = f" and patch_size {patch_size}" if patch_size > 1 else ""
    check_sides(image_size, patch_size << (levels - 1), f"with {levels} channel_multipliers{on_patches}")
    sizes = feature_map_sizes(image_size, patch_size, levels)
    absent = sorted(set(attention_resolutions) - set(sizes))
    if absent:
        raise ValueError(f"attention_resolutions has {absent}, but the feature maps are {sizes} pixels a side")
    for size, multiplier in zip(sizes, channel_multipliers, strict=True):
        channels = multiplier * num_channels
        has_attention = size in attention_resolutions or size == sizes[-1]  # the middle always has
        if has_attention and channels % num_heads:
            raise ValueError(f"num_heads is {num_heads}; it must divide the {channels} channels at size {size}")
