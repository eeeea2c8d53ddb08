"""What a GPU would hold, on PyTorch's meta device, where tensors have sizes but hold nothing."""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of the tensors made within it, each from its making until its storage is freed."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0

    def __torch_dispatch__(self, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        given = _storages(*args, *kwargs.values())
        result = func(*args, **kwargs)
        for storage in _storages(result) - given:  # what shares the storage of an argument is nothing new
            self.now += storage.nbytes()
            weakref.finalize(storage, self._free, storage.nbytes())
        self.peak = max(self.peak, self.now)
        return result

    def _free(self, size: int) -> None:
        self.now -= size


def _storages(*values: Any) -> set[torch.UntypedStorage]:
    """Of the tensors among an operation's `values`, which may be lists of them."""
    found = set()
    for value in values:
        if isinstance(value, Tensor):
            found.add(value.untyped_storage())
        elif isinstance(value, (list, tuple)):
            found |= _storages(*value)
    return found


class GPUArithmetic(TorchFunctionMode):
    """What a GPU does with the operations of these networks, and the meta device does not.

    Attention and dropout are fused kernels, which make neither all of the attention matrix nor a mask of numbers. With
    `dtype` there is torch.autocast: linear layers, convolutions and attention are in that type, normalization is in
    float32, and each trained parameter is cast once.
    """

    LOWERED = (F.linear, F.conv2d, F.scaled_dot_product_attention)
    FLOAT32 = (F.group_norm, F.layer_norm)

    def __init__(self, dtype: torch.dtype | None = None):
        super().__init__()
        self._types: dict[Callable, torch.dtype] = {}
        if dtype is not None:
            self._types = {**dict.fromkeys(self.LOWERED, dtype), **dict.fromkeys(self.FLOAT32, torch.float32)}
        self._casts: dict[Tensor, Tensor] = {}

    def __torch_function__(self, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        if func in self._types:
            cast = functools.partial(self._cast, dtype=self._types[func])
            args, kwargs = tree_map_only(Tensor, cast, (args, kwargs))
        return FUSED.get(func, func)(*args, **kwargs)

    def _cast(self, tensor: Tensor, dtype: torch.dtype) -> Tensor:
        if tensor.dtype == dtype or not tensor.is_floating_point():
            return tensor
        if not (isinstance(tensor, nn.Parameter) and tensor.requires_grad):
            return tensor.to(dtype)
        if tensor not in self._casts:
            self._casts[tensor] = tensor.to(dtype)
        return self._casts[tensor]


def _fused_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
) -> Tensor:
    # Like a GPU's kernels it keeps the inputs, the output and one number for each row, and it runs on the meta device.
    kernel = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    return kernel(query, key, value, dropout_p, is_causal, attn_mask=attn_mask, scale=scale)[0]


def _fused_dropout(input: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
    return torch.native_dropout(input, p, training)[0] if training and p > 0 else input


FUSED = {F.scaled_dot_product_attention: _fused_attention, F.dropout: _fused_dropout}
