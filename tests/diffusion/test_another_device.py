"""Sampling on a device that is not the CPU: levels stay on the CPU and enter kernels as numbers. The meta device, which
has no values that could be copied back, stands in for a GPU."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from improved_diffusion.diffusion.bound import variational_bound
from improved_diffusion.diffusion.denoiser import ClippedDenoiser, NetworkDenoiser
from improved_diffusion.diffusion.guidance import ClassifierFreeGuidance
from improved_diffusion.diffusion.noise import PhiloxNoise
from improved_diffusion.diffusion.process import CosineProcess
from improved_diffusion.diffusion.samplers import SAMPLERS
from improved_diffusion.diffusion.schedule import cosine_schedule, sampling_schedule

OPTIONS = {"heun": {"churn": 2.0}, "ddim": {"eta": 0.5}, "dpmpp_2m": {"eta": 0.5}}


class Uploads(TorchDispatchMode):
    """Counts the tensors that are copied from the CPU, for each of which a host would wait."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func.overloadpacket in (torch.ops.aten._to_copy, torch.ops.aten.copy_):
            devices = [x.device.type for x in tree_leaves((args, out)) if isinstance(x, Tensor)]
            self.count += "cpu" in devices and "meta" in devices
        return out


def guided_denoiser(variance: str) -> ClippedDenoiser:
    channels = 6 if variance == "learned_range" else 3

    def network(x_t: Tensor, t: Tensor, y: Tensor | None) -> Tensor:
        assert x_t.device == t.device == y.device == torch.device("meta")
        assert t.shape == (len(x_t),)
        return x_t.new_empty(len(x_t), channels, *x_t.shape[2:]) * t[:, None, None, None]

    denoiser = NetworkDenoiser(network, "eps", variance)
    return ClippedDenoiser(ClassifierFreeGuidance(denoiser, 2.0, 10, (0.1, 30.0)))


def noise_and_classes() -> tuple[PhiloxNoise, Tensor]:
    noise = PhiloxNoise([(0, 1, 2), (0, 1, 3)], (3, 8, 8), "meta")
    return noise, torch.empty(2, dtype=torch.int64, device="meta")


every_variance = pytest.mark.parametrize("variance", ["fixed_small", "fixed_large", "learned_range"])


@every_variance
@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("process", [cosine_schedule(20).process, CosineProcess()], ids=["steps", "continuous"])
def test_samplers_mix_no_devices_and_copy_nothing(sampler, variance, process):
    guided, schedule, (noise, y) = (
        guided_denoiser(variance),
        sampling_schedule(process, 4, "karras"),
        noise_and_classes(),
    )
    with Uploads() as uploads:
        x = SAMPLERS[sampler](guided, schedule, noise(), y, noise, **OPTIONS.get(sampler, {}))
    assert (x.device.type, x.shape, x.dtype) == ("meta", (2, 3, 8, 8), torch.float32)
    assert uploads.count == 0


@every_variance
def test_the_bound_mixes_no_devices(variance):
    noise, y = noise_and_classes()
    bound = variational_bound(guided_denoiser(variance), cosine_schedule(4), noise(), y, noise)
    assert (bound.total.device.type, bound.vlb.shape) == ("meta", (2, 4))
