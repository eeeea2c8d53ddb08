"""Group normalisation (Wu & He 2018, arXiv:1803.08494), optionally adaptive and with SiLU, and fast on a CPU."""

from __future__ import annotations

import ctypes
import math
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from improved_diffusion.models.autocast import without_autocast
from improved_diffusion.runtime.c_library import compiled

SOURCE = Path(__file__).with_suffix(".c")


class GroupNorm(nn.GroupNorm):
    """Group normalisation in 32 groups, or in the most that divide both 32 and the channels."""

    def __init__(self, channels: int):
        super().__init__(math.gcd(32, channels), channels)

    def forward(
        self, x: Tensor, scale: Tensor | None = None, shift: Tensor | None = None, *, silu: bool = False
    ) -> Tensor:
        """Normalise `x`, (N, C, H, W); with `scale` and `shift`, (N, C), return norm(x) * (1 + scale) + shift; with
        `silu`, SiLU of either.

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
            library = _library(x)
            if library is not None:
                rows = (v.expand(len(x), -1) for v in (weight, bias))
                return _FusedOnCPU.apply(x, *rows, self.num_groups, self.eps, silu, library)
            y = self._normalised(x, weight, bias)
            return F.silu(y) if silu else y

    def _normalised(self, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        """`weight`, `bias`: float32, (C,) or (N, C)."""
        slow = x.device.type == "cpu" and (x.dtype == torch.bfloat16 or _is_channels_last(x, torch.float32))
        if slow and not torch.compiler.is_compiling():
            return _GroupNormOnCPU.apply(x, weight, bias, self.num_groups, self.eps)
        if weight.dim() == 1:
            return F.group_norm(x, self.num_groups, weight.to(x.dtype), bias.to(x.dtype), self.eps)
        x_hat = F.group_norm(x, self.num_groups, eps=self.eps)
        return torch.addcmul(_over_positions(bias, x), x_hat, _over_positions(weight, x))


class _FusedOnCPU(torch.autograd.Function):
    """All in one call of group_norm.c, forwards and backwards, which keeps `x` alone for the way back."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float, silu: bool, library: ctypes.CDLL
    ) -> Tensor:
        """`x`: (N, C, H, W) in channels_last. `weight`, `bias`: float32, (N, C)."""
        n, c, h, w = x.shape
        weight, bias, y = weight.contiguous(), bias.contiguous(), torch.empty_like(x)
        mean, rstd = torch.empty(2, n, groups, dtype=torch.float64)
        ctx.sizes, ctx.library = (n, h * w, c, groups), library
        ctx.flags = (int(silu), torch.get_num_threads())
        sizes = (*map(ctypes.c_long, ctx.sizes), ctypes.c_double(eps))
        library.forward(*_pointers(x, weight, bias), *sizes, *ctx.flags, *_pointers(y, mean, rstd))
        ctx.save_for_backward(x, weight, bias, mean, rstd)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, bias, mean, rstd = ctx.saved_tensors
        grad = grad.to(x.dtype).contiguous(memory_format=torch.channels_last)
        grads = torch.empty_like(x), torch.empty_like(weight), torch.empty_like(bias)
        sizes = map(ctypes.c_long, ctx.sizes)
        ctx.library.backward(*_pointers(grad, x, weight, bias, mean, rstd), *sizes, *ctx.flags, *_pointers(*grads))
        return *grads, None, None, None, None


def _library(x: Tensor) -> ctypes.CDLL | None:
    """What computes `x` in one pass: there is something for channels_last on a CPU, where there is a C compiler.
    torch.compile fuses by itself."""
    if torch.compiler.is_compiling() or x.device.type != "cpu":
        return None
    if _is_channels_last(x, torch.float32):
        return compiled(SOURCE)
    return compiled(SOURCE, "-DBFLOAT16") if _is_channels_last(x, torch.bfloat16) else None


def _pointers(*tensors: Tensor) -> list[ctypes.c_void_p]:
    return [ctypes.c_void_p(tensor.data_ptr()) for tensor in tensors]


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


def _is_channels_last(x: Tensor, dtype: torch.dtype) -> bool:
    return x.dtype == dtype and x.is_contiguous(memory_format=torch.channels_last)


def _over_positions(per_channel: Tensor, x: Tensor) -> Tensor:
    """(N, C) -> (N, C, 1, 1), in the type of `x`."""
    return per_channel.to(x.dtype)[:, :, None, None]
