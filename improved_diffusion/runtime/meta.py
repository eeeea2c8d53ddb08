"""PyTorch's meta device, where tensors have sizes but hold nothing."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

Layout = tuple[torch.Size, tuple[int, ...], torch.dtype]
"""Shape, strides and type of a tensor."""


class KnownLayouts(TorchDispatchMode):
    """Finds the layouts of an operation's results once in a process. On the meta device PyTorch finds them in Python,
    which takes most of the time of what is counted there, and networks repeat few operations.

    Modes that count are entered within it. What shares memory with its arguments is left to PyTorch.
    """

    _known: dict[Hashable, list[Layout | None]] = {}

    def __torch_dispatch__(
        self, func: Callable, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        key = _described((func, args, *kwargs.items()))
        if layouts := self._known.get(key):
            results = tuple(layout and _empty(*layout) for layout in layouts)
            return results if len(results) > 1 else results[0]
        result = func(*args, **kwargs)
        given = _tensors((args, *kwargs.values()))
        results = result if isinstance(result, tuple) else (result,)
        if all(tensor.is_meta for tensor in given) and _are_new(results, given):
            self._known[key] = [made if made is None else (made.shape, made.stride(), made.dtype) for made in results]
        return result


def _described(value: Any) -> Hashable:
    """All that the layouts of results can depend on: of tensors their own layout, of other things what they are."""
    if isinstance(value, Tensor):
        return type(value), value.device, value.dtype, value.shape, value.stride()
    if isinstance(value, (list, tuple)):
        return tuple(map(_described, value))
    return type(value), value  # 1 and 1.0 are equal, but what they are added to has another type


def _tensors(value: Any) -> list[Tensor]:
    if isinstance(value, (list, tuple)):
        return [tensor for part in value for tensor in _tensors(part)]
    return [value] if isinstance(value, Tensor) else []


def _are_new(results: tuple, given: list[Tensor]) -> bool:
    """Whether each is None or a tensor on the meta device that fills memory of its own."""
    made = [result for result in results if result is not None]
    if not made or not all(type(tensor) is Tensor and tensor.is_meta and _fills(tensor) for tensor in made):
        return False
    storages = {tensor.untyped_storage() for tensor in made}
    return len(storages) == len(made) and not storages & {tensor.untyped_storage() for tensor in given}


def _fills(tensor: Tensor) -> bool:
    """Whether there is nothing in its memory but itself."""
    last = sum((size - 1) * step for size, step in zip(tensor.shape, tensor.stride(), strict=True))
    return tensor.untyped_storage().nbytes() == (last + 1) * tensor.element_size()


def _empty(shape: torch.Size, strides: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    return torch.empty_strided(shape, strides, dtype=dtype, device="meta")
