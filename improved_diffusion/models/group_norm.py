"""Group normalisation (Wu & He 2018, arXiv:1803.08494), optionally adaptive, and fast on a CPU."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from improved_diffusion.models.autocast import without_autocast


class GroupNorm(nn.GroupNorm):
    """Group normalisation in 32 groups, or in the most that divide both 32 and the channels."""

    def __init__(self, channels: int):
        super().__init__(math.gcd(32, channels), channels)

    def forward(self, x: Tensor, scale: Tensor | None = None, shift: Tensor | None = None) -> Tensor:
        """Normalise `x`, (N, C, H, W); with `scale` and `shift`, (N, C), return norm(x) * (1 + scale) + shift.

        The result has the type of `x` and, on a CPU, its memory format; statistics are float32 in any case.
        """
        # CUDA autocast would make float32 of bfloat16 activations here: twice the memory traffic, for kernels that
        # accumulate in float32 anyway.
        with without_autocast(x.device):
            weight: Tensor = self.weight
            bias: Tensor = self.bias
            if scale is not None and shift is not None:  # one affine map in place of two
                gain = 1 + scale.float()
                weight, bias = weight * gain, bias * gain + shift.float()
            if x.device.type == "cpu" and (x.dtype == torch.bfloat16 or _is_channels_last_float32(x)):
                return _GroupNormOnCPU.apply(x, weight, bias, self.num_groups, self.eps)
            if scale is None:
                return F.group_norm(x, self.num_groups, weight.to(x.dtype), bias.to(x.dtype), self.eps)
            x_hat = F.group_norm(x, self.num_groups, eps=self.eps)
            return torch.addcmul(_over_positions(bias, x), x_hat, _over_positions(weight, x))


class _GroupNormOnCPU(torch.autograd.Function):
    """For a CPU, where PyTorch's own backward pass over channels_last takes two to three times as long as this one (its
    inner loop is over the few channels of one group), in bfloat16 several times, and would be a third of a training
    step. PyTorch's NCHW in float32 is as fast.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float) -> Tensor:
        """`x`: (N, C, H, W). `weight`, `bias`: float32, (C,) or (N, C)."""
        n, c, h, w = x.shape
        of_all = weight.dim() == 1
        common = (weight, bias) if of_all else (torch.ones_like(weight[0]), torch.zeros_like(bias[0]))
        # For maps below 1024 pixels PyTorch's kernel takes another path, which is slower than going through float32.
        y, mean, rstd = torch.native_group_norm(x if h * w >= 1024 else x.float(), *common, n, c, h * w, groups, eps)
        y = y.to(x.dtype)
        if not of_all:
            torch.addcmul(_over_positions(bias, x), y, _over_positions(weight, x), out=y)
        ctx.save_for_backward(x, weight, mean, rstd)
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """With x_hat = (x - mean) * rstd and g = grad * weight,

            dx = rstd * (g - mean over the group of g - x_hat * mean over the group of (g * x_hat))

        which is a * grad + b * x + c, where a, b and c are constant over each channel of each sample: only the two sums
        over positions and the last line touch whole feature maps.
        """
        x, weight, mean, rstd = ctx.saved_tensors
        n, channels, height, width = x.shape
        grouped = (-1, mean.shape[1], channels // mean.shape[1])  # (N, groups, channels of one)
        mean, rstd, gain = mean[..., None], rstd[..., None], weight.reshape(grouped)

        product = grad * x
        grad_bias = grad.sum((2, 3)).float().reshape(grouped)
        grad_weight = rstd * (product.sum((2, 3)).float().reshape(grouped) - mean * grad_bias)
        count = grouped[2] * height * width
        a = rstd * gain
        b = -(rstd**2) * (gain * grad_weight).sum(2, keepdim=True) / count
        c = -rstd * (gain * grad_bias).sum(2, keepdim=True) / count - b * mean
        a, b, c = (_over_positions(v.expand_as(a).reshape(n, channels), x) for v in (a, b, c))
        grad_x = torch.addcmul(c, x, b, out=product).addcmul_(grad, a)
        grad_weight, grad_bias = (v.reshape(n, channels).sum_to_size(weight.shape) for v in (grad_weight, grad_bias))
        return grad_x, grad_weight, grad_bias, None, None


def _is_channels_last_float32(x: Tensor) -> bool:
    return x.dtype == torch.float32 and x.is_contiguous(memory_format=torch.channels_last)


def _over_positions(per_channel: Tensor, x: Tensor) -> Tensor:
    """(N, C) -> (N, C, 1, 1), in the type of `x`."""
    return per_channel.to(x.dtype)[:, :, None, None]
