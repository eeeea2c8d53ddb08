"""How much arithmetic training is, and how near to a GPU's limit a run comes."""

from __future__ import annotations

import re

import torch
from torch.utils.flop_counter import FlopCounterMode

from improved_diffusion.config import ModelConfig
from improved_diffusion.models.backbone import Backbone
from improved_diffusion.runtime.meta import KnownLayouts

# Dense TFLOP/s in bfloat16 with float32 sums, and in float32 without TF32, as NVIDIA's data sheets give them.
PEAKS: dict[str, dict[torch.dtype, float]] = {
    name: {torch.bfloat16: bf16, torch.float32: float32}
    for name, bf16, float32 in (
        (r"NVIDIA A100.*", 312.0, 19.5),
        (r"NVIDIA H100 PCIe", 756.0, 51.2),
        (r"NVIDIA H100 NVL", 835.0, 60.0),
        (r"NVIDIA H100 80GB HBM3|NVIDIA H200|NVIDIA GH200.*", 989.4, 66.9),
        (r"NVIDIA A40", 149.7, 37.4),
        (r"NVIDIA A10", 125.0, 31.2),
        (r"NVIDIA L40S", 362.0, 91.6),
        (r"NVIDIA L4", 121.0, 30.3),
        (r"NVIDIA GeForce RTX 3090", 71.0, 35.6),
        (r"NVIDIA GeForce RTX 4090", 165.2, 82.6),
    )
}


def flops_per_image(network: Backbone, model: ModelConfig) -> int:
    """Floating-point operations of the network for one image of a training step, forward and backward: those of
    convolutions and matrix products, a multiplication and an addition counted as two.

    Counted by PyTorch on the meta device, where nothing is computed and nothing drawn. What gradient checkpointing
    computes twice counts once.
    """
    weights = {name: torch.empty_like(p, device="meta", requires_grad=True) for name, p in network.named_parameters()}
    x_t, t = torch.empty(1, *model.image_shape, device="meta"), torch.empty(1, device="meta")
    y = torch.empty(1, dtype=torch.int64, device="meta") if model.class_conditional else None
    twice, network.gradient_checkpointing = network.gradient_checkpointing, False
    try:
        with KnownLayouts(), FlopCounterMode(display=False) as counter:
            torch.func.functional_call(network, weights, (x_t, t, y)).sum().backward()
    finally:
        network.gradient_checkpointing = twice
    return counter.get_total_flops()


def peak_tflops(device: torch.device, dtype: torch.dtype) -> float | None:
    """What `device` could do at the most in this arithmetic, in TFLOP/s; None where that is not known."""
    if device.type != "cuda":
        return None
    return peak_of(torch.cuda.get_device_name(device), dtype)


def peak_of(name: str, dtype: torch.dtype) -> float | None:
    """The same, of a GPU that calls itself `name`. A part of one (MIG) has no peak that is known."""
    whole = (peaks for known, peaks in PEAKS.items() if re.fullmatch(known, name) and "MIG" not in name)
    return next(whole, {}).get(dtype)
