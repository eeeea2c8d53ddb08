"""Frozen weights in few bits: NF4 by bitsandbytes, int8 and fp8 by torchao; computed is in the longer type."""

from __future__ import annotations

import importlib.util

import torch
import torch.nn.functional as F
from torch import Tensor, nn

LIBRARIES = {"nf4": "bitsandbytes", "int8": "torchao", "fp8": "torchao"}
# Bytes of a weight. In NF4 blocks of 64 share a float32 scale (Dettmers et al. 2023, arXiv:2305.14314); in the others
# the weights of an output do, which is next to nothing.
WEIGHT_BYTES = {"nf4": 1 / 2 + 4 / 64, "int8": 1.0, "fp8": 1.0}


class QuantizedLinear(nn.Linear):
    """A frozen linear layer whose weight torchao holds in few bits.

    torchao's own layer keeps its whole weight in the longer type for the backward pass; this one dequantizes it again.
    """

    def __init__(self, packed: Tensor, bias: Tensor | None):
        nn.Module.__init__(self)  # that of nn.Linear would make a weight
        self.out_features, self.in_features = packed.shape
        self.packed = nn.Parameter(packed, requires_grad=False)
        self.bias = bias

    @property
    def weight(self) -> Tensor:
        """(out, in), in the type that the layer computes in."""
        return self.packed.dequantize()

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) to (..., out)."""
        return _Product.apply(x.to(self.packed.dtype), self)


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, layer: QuantizedLinear) -> Tensor:
        ctx.layer = layer
        return F.linear(x, layer.packed, layer.bias).to(x.dtype)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient @ ctx.layer.weight.to(gradient.dtype), None


def quantize(network: nn.Module, kind: str) -> None:
    """Hold the linear layers of a network, but those of adapters, in the form `kind`, a key of LIBRARIES, frozen, in
    place, on its device. To be called once the network has the type that it computes in.

    Raises:
        ModuleNotFoundError: the library is not installed.
    """
    for path, layer in list(network.named_modules()):
        if type(layer) is nn.Linear and ".lora_" not in path:
            network.set_submodule(path, _nf4(layer) if kind == "nf4" else _by_torchao(layer, kind))


def require_library(name: str) -> None:
    """Raise ModuleNotFoundError, which the command line answers, if a library is not installed."""
    if importlib.util.find_spec(name) is None:
        raise ModuleNotFoundError(f"No module named {name!r}", name=name)


def _nf4(layer: nn.Linear) -> nn.Linear:
    from bitsandbytes.nn import Linear4bit, Params4bit

    device, dtype = layer.weight.device, layer.weight.dtype
    settings = {"quant_type": "nf4", "compress_statistics": False}
    packed = Linear4bit(layer.in_features, layer.out_features, layer.bias is not None, dtype, **settings, device="meta")
    packed.weight, packed.bias = Params4bit(layer.weight.data, requires_grad=False, **settings), layer.bias
    return packed.to(device)  # which is when bitsandbytes packs it


def _by_torchao(layer: nn.Linear, kind: str) -> nn.Linear:
    from torchao.quantization import Float8WeightOnlyConfig, Int8WeightOnlyConfig, quantize_

    quantize_(layer, Int8WeightOnlyConfig() if kind == "int8" else Float8WeightOnlyConfig())
    return QuantizedLinear(layer.weight.data, layer.bias)
