from __future__ import annotations

import pytest
import torch

from improved_diffusion.diffusion.denoiser import NetworkDenoiser
from improved_diffusion.diffusion.guidance import ClassifierFreeGuidance
from improved_diffusion.diffusion.samplers import SAMPLERS
from improved_diffusion.diffusion.schedule import cosine_schedule, sampling_schedule

NULL = 10
T = 100
PREDICTIONS = ["eps", "x_start", "v"]


def network(x_t, t, y):
    """Depends on everything that it is given, and its variance channels do, too."""
    label = y.to(x_t.dtype).view(-1, 1, 1, 1)
    time = t.to(x_t.dtype).view(-1, 1, 1, 1) / 1000
    return torch.cat([torch.sin(x_t + label) * (1 + time), torch.cos(label * x_t)], dim=1)


def denoiser(prediction: str) -> NetworkDenoiser:
    return NetworkDenoiser(network, prediction, "learned_range")


@pytest.fixture
def batch():
    generator = torch.Generator().manual_seed(0)
    return torch.randn(3, 3, 4, 4, generator=generator), cosine_schedule(T).at(50), torch.tensor([1, 4, 9])


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("scale", [0.0, 0.5, 1.0, 3.0])
def test_eps_is_extrapolated_from_no_class_to_the_class(batch, prediction, scale):
    x_t, level, y = batch
    plain = denoiser(prediction)
    conditional, unconditional = plain(x_t, level, y), plain(x_t, level, torch.full_like(y, NULL))
    guided = ClassifierFreeGuidance(plain, scale, NULL)(x_t, level, y)
    expected = (1 - scale) * unconditional.eps + scale * conditional.eps
    torch.testing.assert_close(guided.eps, expected, rtol=1e-4, atol=1e-4)
    # x_0 is affine in eps, so that it is extrapolated likewise
    expected = (1 - scale) * unconditional.x_start + scale * conditional.x_start
    torch.testing.assert_close(guided.x_start, expected, rtol=1e-4, atol=2e-4)
    assert torch.equal(guided.log_variance, conditional.log_variance)


def test_class_and_no_class_are_one_batch(batch):
    x_t, level, y = batch
    calls = []

    def recording(*arguments):
        calls.append(arguments)
        return network(*arguments)

    plain = NetworkDenoiser(recording, "eps", "learned_range")
    ClassifierFreeGuidance(plain, 2.0, NULL)(x_t, level, y)
    (call,) = calls
    torch.testing.assert_close(call[0], torch.cat([x_t, x_t]))
    torch.testing.assert_close(call[1], torch.full((6,), 500.0))
    assert call[2].tolist() == [1, 4, 9, NULL, NULL, NULL]


@pytest.mark.parametrize("sampler", SAMPLERS.values(), ids=SAMPLERS.keys())
@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_scale_1_samples_as_without_guidance_and_scale_0_as_without_class(batch, sampler, prediction):
    x_T, _, y = batch

    def sample(model, classes):
        generator = torch.Generator().manual_seed(1)
        schedule = sampling_schedule(cosine_schedule(T).process, 25, "karras")
        return sampler(model, schedule, x_T, classes, lambda: torch.randn(x_T.shape, generator=generator))

    plain = denoiser(prediction)
    torch.testing.assert_close(sample(ClassifierFreeGuidance(plain, 1.0, NULL), y), sample(plain, y), rtol=0, atol=5e-3)
    if sampler is SAMPLERS["ddim"]:  # others draw noise of the conditional variance
        without_class = sample(plain, torch.full_like(y, NULL))
        torch.testing.assert_close(
            sample(ClassifierFreeGuidance(plain, 0.0, NULL), y), without_class, rtol=0, atol=5e-3
        )


def test_guidance_without_classes_is_an_error(batch):
    x_t, level, _ = batch
    with pytest.raises(ValueError, match="guidance needs classes"):
        ClassifierFreeGuidance(denoiser("eps"), 2.0, NULL)(x_t, level, None)
