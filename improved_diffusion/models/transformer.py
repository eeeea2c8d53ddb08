"""A diffusion transformer on patches of pixels.

The plan is that of DiT (Peebles & Xie 2023, arXiv:2212.09748), with the parts of JiT (Li & He 2025, arXiv:2511.13720):
RMSNorm, SwiGLU, normalised queries and keys, 2-D rotary positions, and class tokens that join the patches after the
first third of the blocks. Noise level and class scale, shift and gate every branch (adaLN-zero); gates and the last
layer start at zero.

What JiT finds goes with it: where a patch has as many channels as a token is wide, or more, such a network still
learns to predict x_0, but neither noise nor v.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from improved_diffusion.models.backbone import Backbone, check_sides, zero_init

NORM_EPS = 1e-6
ROTARY_BASE = 100.0  # for images, as in Heo et al. 2024, arXiv:2403.13298; 10000 is for the distances of language
TIME_CHANNELS = 256  # as in DiT


def xavier_init(layer: nn.Linear) -> nn.Linear:
    """Draw the weights of `layer` as Glorot & Bengio 2010 do, uniformly, and zero its bias if it has one."""
    nn.init.xavier_uniform_(layer.weight)
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)
    return layer


def rotary_positions(height: int, width: int, channels: int, num_context: int, device: torch.device) -> Tensor:
    """The rotations (Su et al. 2021, arXiv:2104.09864) of the tokens of a height x width map, row by row.

    Half of a head's `channels`, a multiple of 4, turn with the row and half with the column. The `num_context` tokens
    that come first have no place, and do not turn. Returns float32 (2, num_context + height * width, channels / 2):
    cosines and sines.
    """
    quarter = channels // 4
    frequencies = ROTARY_BASE ** (-torch.arange(quarter, dtype=torch.float32, device=device) / quarter)
    rows = torch.arange(height, device=device).repeat_interleave(width)
    columns = torch.arange(width, device=device).repeat(height)
    angles = torch.cat([rows[:, None] * frequencies, columns[:, None] * frequencies], dim=1)
    angles = F.pad(angles, (0, 0, num_context, 0))
    return torch.stack([angles.cos(), angles.sin()])


def rotate(x: Tensor, rotations: Tensor) -> Tensor:
    """Turn channel i of `x`, (N, heads, tokens, channels), with channel i + channels / 2, by `rotary_positions`."""
    cos, sin = rotations
    a, b = x.chunk(2, dim=-1)
    return torch.cat([a * cos - b * sin, a * sin + b * cos], dim=-1)


class Attention(nn.Module):
    """Multi-head self-attention, with queries and keys of unit mean square (Dehghani et al. 2023, arXiv:2302.05442)
    that turn with their position.
    """

    def __init__(self, width: int, num_heads: int):
        super().__init__()
        self.num_heads = num_heads
        self.qkv = xavier_init(nn.Linear(width, 3 * width, bias=False))
        self.q_norm = nn.RMSNorm(width // num_heads, eps=NORM_EPS)
        self.k_norm = nn.RMSNorm(width // num_heads, eps=NORM_EPS)
        self.out = xavier_init(nn.Linear(width, width, bias=False))

    def forward(self, x: Tensor, rotations: Tensor) -> Tensor:
        """`x`: (N, tokens, width). `rotations`: of `rotary_positions`. Returns (N, tokens, width)."""
        n, tokens, width = x.shape
        q, k, v = self.qkv(x).reshape(n, tokens, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4)
        q = rotate(self.q_norm(q.float()), rotations).to(v.dtype)
        k = rotate(self.k_norm(k.float()), rotations).to(v.dtype)
        return self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(n, tokens, width))


class SwiGLU(nn.Module):
    """out(silu(gate(x)) * value(x)) (Shazeer 2020, arXiv:2002.05202), with as many parameters as the usual two layers
    of 4 x width.
    """

    def __init__(self, width: int):
        super().__init__()
        hidden = 8 * (width // 3)
        self.gate_and_value = xavier_init(nn.Linear(width, 2 * hidden, bias=False))
        self.out = xavier_init(nn.Linear(hidden, width, bias=False))

    def forward(self, x: Tensor) -> Tensor:
        gate, value = self.gate_and_value(x).chunk(2, dim=-1)
        return self.out(F.silu(gate) * value)


def adaptive_norm(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """RMSNorm (Zhang & Sennrich 2019, arXiv:1910.07467) of (N, tokens, width), scaled and shifted by (N, 1, width)."""
    return F.rms_norm(x, x.shape[-1:], eps=NORM_EPS) * (1 + scale) + shift


class Block(nn.Module):
    """Attention, then SwiGLU, each shifted, scaled and gated by the embedding; the identity at first."""

    def __init__(self, width: int, num_heads: int, dropout: float):
        super().__init__()
        self.modulation = zero_init(nn.Linear(width, 6 * width))
        self.attention = Attention(width, num_heads)
        self.mlp = SwiGLU(width)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, embedding: Tensor, rotations: Tensor) -> Tensor:
        """`x`: (N, tokens, width). `embedding`: (N, width). Returns (N, tokens, width)."""
        shift1, scale1, gate1, shift2, scale2, gate2 = self.modulation(embedding)[:, None].chunk(6, dim=-1)
        x = x + gate1 * self.dropout(self.attention(adaptive_norm(x, shift1, scale1), rotations))
        return x + gate2 * self.dropout(self.mlp(adaptive_norm(x, shift2, scale2)))


class Transformer(Backbone):
    """A `Backbone` that sees the image as a sequence of patches, all of one width.

    patch_size              pixels a side of a patch; divides height and width
    width                   channels of every token
    depth                   number of blocks
    num_heads               heads of every attention layer; each has width / num_heads channels, a multiple of 4
    num_context_tokens      learned tokens, to which the class is added, that join the patches after a third of the
                            blocks; 0 for none
    bottleneck              let the patches through a layer of so few channels, or None: JiT gains by it where they are
                            large (128 channels of 16x16 pixels)
    dropout                 probability of dropping a feature of what a branch adds, in training

    The other settings are those of every `Backbone`. Raises ValueError for settings that do not fit together.
    """

    def __init__(
        self,
        *,
        image_size: int | tuple[int, int],
        in_channels: int = 3,
        out_channels: int | None = None,
        patch_size: int = 4,
        width: int = 384,
        depth: int = 12,
        num_heads: int = 6,
        num_context_tokens: int = 32,
        bottleneck: int | None = None,
        dropout: float = 0.0,
        num_classes: int | None = None,
        null_class: bool = False,
        augmented: bool = False,
    ):
        check_geometry(image_size, patch_size, width, depth, num_heads, num_context_tokens, bottleneck)
        super().__init__(
            image_size=image_size,
            in_channels=in_channels,
            out_channels=out_channels,
            num_classes=num_classes,
            null_class=null_class,
            augmented=augmented,
            time_channels=TIME_CHANNELS,
            embedding_channels=width,
        )
        self.patch_size = patch_size
        self.head_channels = width // num_heads
        self.num_context_tokens = num_context_tokens
        self.context_start = depth // 3
        if num_classes is not None:  # as small as the tokens that it is added to
            nn.init.normal_(self.class_embedding.weight, std=0.02)

        patch_channels = in_channels * patch_size**2
        squeeze = [] if bottleneck is None else [xavier_init(nn.Linear(patch_channels, bottleneck, bias=False))]
        self.patch_embedding = nn.Sequential(*squeeze, xavier_init(nn.Linear(bottleneck or patch_channels, width)))
        self.context_tokens = nn.Parameter(nn.init.normal_(torch.empty(num_context_tokens, width), std=0.02))
        self.blocks = nn.ModuleList(Block(width, num_heads, dropout) for _ in range(depth))
        self.output_modulation = zero_init(nn.Linear(width, 2 * width))
        self.output = zero_init(nn.Linear(width, self.out_channels * patch_size**2))

    def hidden_parts(self) -> list[nn.Module]:
        return [self.blocks]

    def forward(
        self, x_t: Tensor, t: Tensor, y: Tensor | None = None, augmentation: Tensor | None = None
    ) -> Tensor:
        """Run the network: see `Backbone.forward`."""
        self.check_inputs(x_t, t, y)
        embedding = F.silu(self.embed(t, y, augmentation))  # once here rather than in every block
        patches = F.pixel_unshuffle(x_t, self.patch_size)
        rows, columns = patches.shape[2:]
        num_context = self.num_context_tokens
        rotations = rotary_positions(rows, columns, self.head_channels, num_context, x_t.device)

        h = self.patch_embedding(patches.flatten(2).transpose(1, 2)).float()  # what blocks add to stays float32
        for block in self.blocks[: self.context_start]:
            h = block(h, embedding, rotations[:, num_context:])
        h = torch.cat([self.context(y).expand(len(h), -1, -1), h], dim=1)
        for block in self.blocks[self.context_start :]:
            h = block(h, embedding, rotations)

        shift, scale = self.output_modulation(embedding)[:, None].chunk(2, dim=-1)
        h = self.output(adaptive_norm(h[:, num_context:], shift, scale))
        return F.pixel_shuffle(h.transpose(1, 2).unflatten(2, (rows, columns)), self.patch_size).float()

    def context(self, y: Tensor | None) -> Tensor:
        """The tokens that join the patches: (N, num_context_tokens, width), or (1, ...) without classes."""
        return self.context_tokens[None] if y is None else self.context_tokens + self.class_embedding(y)[:, None]


def check_geometry(
    image_size: int | tuple[int, int],
    patch_size: int,
    width: int,
    depth: int,
    num_heads: int,
    num_context_tokens: int,
    bottleneck: int | None,
) -> None:
    """Raise ValueError, in one sentence, where these settings of a `Transformer` do not fit together."""
    for name, value, least in [
        ("patch_size", patch_size, 1),
        ("width", width, 1),
        ("depth", depth, 1),
        ("num_heads", num_heads, 1),
        ("num_context_tokens", num_context_tokens, 0),
        ("bottleneck", bottleneck, 1),
    ]:
        if value is not None and value < least:
            raise ValueError(f"{name} is {value}; it must be at least {least}")
    check_sides(image_size, patch_size, f"with patch_size {patch_size}")
    if width % (4 * num_heads):
        raise ValueError(
            f"width is {width}; with {num_heads} heads it must be divisible by {4 * num_heads}: a head's channels turn "
            "in pairs, half of them with the row and half with the column"
        )
