"""The networks that cut out: SegFormer, and a UNet to compare it with."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from improved_diffusion.errors import UserError
from improved_diffusion.models.build import set_weights
from improved_diffusion.models.group_norm import GroupNorm
from improved_diffusion.stickers.segment.config import ModelConfig

IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # mean and deviation, which published checkpoints expect


class CutoutNetwork(nn.Module):
    """`body` as a network of pictures: uint8 (N, 3, H, W), whose sides are divisible by the settings' `divisor`, ->
    logits of alpha, float32 (N, H, W)."""

    def __init__(self, body: nn.Module):
        super().__init__()
        self.body = body
        for name, values in zip(("mean", "deviation"), IMAGENET, strict=True):
            self.register_buffer(name, 255 * torch.tensor(values).view(3, 1, 1), persistent=False)

    def forward(self, pictures: Tensor) -> Tensor:
        logits = self.body((pictures.float() - self.mean) / self.deviation).float()
        return F.interpolate(logits, pictures.shape[-2:], mode="bilinear", align_corners=False)[:, 0]


class SegFormer(nn.Module):
    """transformers' SegformerForSemanticSegmentation (Xie et al. 2021, arXiv:2105.15203): (N, 3, H, W) -> logits
    (N, 1, H / 4, W / 4). Without its dropout: no picture is seen twice."""

    def __init__(self, model: ModelConfig, *, pretrained: bool):
        super().__init__()
        from transformers import SegformerConfig, SegformerForSemanticSegmentation

        config = SegformerConfig(
            num_labels=1,
            hidden_sizes=model.level_widths,
            depths=model.level_depths,
            num_attention_heads=model.heads,
            decoder_hidden_size=model.decoder_width,
            drop_path_rate=0.0,
            classifier_dropout_prob=0.0,
        )
        if pretrained and model.checkpoint is not None:
            self.network = SegformerForSemanticSegmentation.from_pretrained(
                model.checkpoint, config=config, ignore_mismatched_sizes=True
            )
        else:
            self.network = SegformerForSemanticSegmentation(config)

    def forward(self, x: Tensor) -> Tensor:
        return self.network(pixel_values=x).logits


class Block(nn.Module):
    """norm, SiLU, conv, twice; added to the input."""

    def __init__(self, in_channels: int, out_channels: int):
        super().__init__()
        self.norm1, self.norm2 = GroupNorm(in_channels), GroupNorm(out_channels)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        self.skip = nn.Identity() if in_channels == out_channels else nn.Conv2d(in_channels, out_channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv1(self.norm1(x, silu=True))
        return self.conv2(self.norm2(h, silu=True)) + self.skip(x)


class UNet(nn.Module):
    """The plain segmentation UNet (Ronneberger et al. 2015, arXiv:1505.04597), of residual blocks with group norms:
    (N, 3, H, W) -> logits (N, 1, H, W). That of models/unet.py, which removes noise, knows of time and of one size.
    With `patch_size` its first level is of patches: space to depth, and back at the end."""

    def __init__(self, model: ModelConfig):
        super().__init__()
        widths, self.patch_size = model.level_widths, model.patch_size
        self.input = nn.Conv2d(3 * self.patch_size**2, widths[0], 3, padding=1)
        self.down, self.up, self.smaller = nn.ModuleList(), nn.ModuleList(), nn.ModuleList()
        for level, (width, depth) in enumerate(zip(widths, model.level_depths, strict=True)):
            before = widths[max(0, level - 1)]
            self.down.append(self._blocks(before, width, depth))
            if level:
                self.smaller.append(nn.Conv2d(before, before, 3, stride=2, padding=1))
                self.up.append(self._blocks(width + before, before, depth))
        self.norm = GroupNorm(widths[0])
        self.output = nn.Conv2d(widths[0], self.patch_size**2, 3, padding=1)

    @staticmethod
    def _blocks(in_channels: int, out_channels: int, depth: int) -> nn.Sequential:
        rest = (Block(out_channels, out_channels) for _ in range(depth - 1))
        return nn.Sequential(Block(in_channels, out_channels), *rest)

    def forward(self, x: Tensor) -> Tensor:
        h = self.down[0](self.input(F.pixel_unshuffle(x, self.patch_size)))
        skips = []
        for smaller, blocks in zip(self.smaller, self.down[1:], strict=True):
            skips.append(h)
            h = blocks(smaller(h))
        for blocks in reversed(self.up):
            h = blocks(torch.cat([F.interpolate(h, scale_factor=2), skips.pop()], dim=1))
        return F.pixel_shuffle(self.output(self.norm(h, silu=True)), self.patch_size)


def sized_by_checkpoint(model: ModelConfig) -> ModelConfig:
    """The settings with the sizes of the SegFormer at `model.checkpoint`, if they name one.

    Raises:
        UserError: there is none that can be read.
    """
    if model.checkpoint is None:
        return model
    from transformers import SegformerConfig

    try:
        found = SegformerConfig.from_pretrained(model.checkpoint)
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(f"cannot read a SegFormer at model.checkpoint {model.checkpoint}: {reason}") from error
    return dataclasses.replace(
        model,
        widths=tuple(found.hidden_sizes),
        depths=tuple(found.depths),
        heads=tuple(found.num_attention_heads),
        decoder_width=found.decoder_hidden_size,
    )


def build_network(model: ModelConfig, seed: int, *, pretrained: bool = False) -> CutoutNetwork:
    """The network of the settings, its new weights drawn from `seed`.

    Args:
        model: the settings.
        seed: of the weights.
        pretrained: whether those that `model.checkpoint` has, if it is named, come from there.

    Raises:
        UserError: the checkpoint cannot be read, or the settings make no network.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        try:
            body = SegFormer(model, pretrained=pretrained) if model.kind == "segformer" else UNet(model)
        except (OSError, ValueError, ZeroDivisionError, RuntimeError) as error:
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise UserError(f"the settings under model make no network: {reason}") from error
    return CutoutNetwork(body).to(memory_format=torch.channels_last)


def learned(network: nn.Module) -> dict[str, Tensor]:
    """Weights, and the statistics of batch norms, by name; not copies. The count of batches, a whole number that
    nothing depends on, is left out."""
    return {name: t for name, t in network.state_dict(keep_vars=True).items() if t.is_floating_point()}


def set_learned(network: nn.Module, values: Mapping[str, Tensor]) -> None:
    """Give `network` what `learned` gave, in any precision. Raises UserError where it is of another architecture."""
    uncounted = {name: t for name, t in network.state_dict().items() if not t.is_floating_point()}
    set_weights(network, {**uncounted, **values})


def cutout_loss(logits: Tensor, alpha: Tensor) -> dict[str, Tensor]:
    """The loss and its two halves, scalars: binary cross-entropy, and 1 less the soft Dice coefficient of each picture
    (Milletari et al. 2016, arXiv:1606.04797), without which small subjects count for little.

    logits, alpha: (N, H, W), alpha in [0, 1].
    """
    bce = F.binary_cross_entropy_with_logits(logits, alpha)
    p = logits.sigmoid()
    overlap, total = (p * alpha).sum((1, 2)), (p * p + alpha * alpha).sum((1, 2))
    dice = (1 - (2 * overlap + 1) / (total + 1)).mean()
    return {"loss": bce + dice, "bce": bce, "dice": dice}
