from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from improved_diffusion.diffusion import process
from improved_diffusion.diffusion.denoiser import DiscreteDenoiser
from improved_diffusion.diffusion.schedule import cosine_schedule, respace

PREDICTIONS = ["eps", "x_start", "v"]


def no_network(x_t, t, y):
    raise AssertionError("not to be run")


@given(st.integers(0, 199), st.integers(0, 2**31))
def test_the_same_belief_in_three_parameterizations(t, seed):
    """Outputs that stand for one x_0 are read as one Prediction."""
    schedule = cosine_schedule(200)
    generator = torch.Generator().manual_seed(seed)
    x_t, x_start = torch.randn(2, 1, 3, 4, 4, generator=generator, dtype=torch.float64)
    t = torch.tensor([t])
    abar = schedule.alphas_cumprod[t].item()
    eps = (x_t - abar**0.5 * x_start) / (1 - abar) ** 0.5
    outputs = {"eps": eps, "x_start": x_start, "v": abar**0.5 * eps - (1 - abar) ** 0.5 * x_start}
    for name, output in outputs.items():
        prediction = DiscreteDenoiser(no_network, schedule, name, "fixed_small").interpret(x_t, t, output, None)
        torch.testing.assert_close(prediction.x_start, x_start, rtol=0, atol=1e-10)
        torch.testing.assert_close(prediction.eps, eps, rtol=0, atol=1e-10)


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_a_network_that_hits_its_target_knows_x_start_and_eps(prediction):
    schedule = cosine_schedule(50)
    denoiser = DiscreteDenoiser(no_network, schedule, prediction, "fixed_small")
    generator = torch.Generator().manual_seed(0)
    x_start, noise = torch.randn(2, 50, 3, 4, 4, generator=generator, dtype=torch.float64)
    t = torch.arange(50)
    x_t = process.q_sample(schedule, x_start, t, noise)
    known = denoiser.interpret(x_t, t, denoiser.target(x_start, t, noise), None)
    torch.testing.assert_close(known.x_start, x_start, rtol=0, atol=1e-9)
    torch.testing.assert_close(known.eps, noise, rtol=0, atol=1e-9)


@pytest.mark.parametrize(("variance", "channels"), [("fixed_small", 3), ("fixed_large", 3), ("learned_range", 6)])
def test_network_output_is_split_and_read_in_float32(variance, channels):
    schedule = cosine_schedule(10)
    generator = torch.Generator().manual_seed(0)
    output = torch.randn(4, channels, 8, 8, generator=generator).bfloat16()
    denoiser = DiscreteDenoiser(lambda x_t, t, y: output, schedule, "x_start", variance)
    t = torch.tensor([0, 3, 5, 9])
    prediction = denoiser(torch.zeros(4, 3, 8, 8), t, None)
    assert torch.equal(prediction.x_start, output[:, :3].float())
    expected = (
        process.learned_range_log_variance(schedule, t, output[:, 3:].float())
        if variance == "learned_range"
        else process.fixed_log_variance(schedule, variance, t, torch.zeros(4, 3, 8, 8))
    )
    assert prediction.log_variance.dtype == torch.float32
    assert torch.equal(prediction.log_variance, expected)


def test_network_receives_x_t_and_classes_as_they_are():
    received = []

    def network(x_t, t, y):
        received.append((x_t, y))
        return x_t

    x_t, y = torch.randn(2, 3, 4, 4), torch.tensor([5, 6])
    denoiser = DiscreteDenoiser(network, cosine_schedule(10), "eps", "fixed_small")
    denoiser(x_t, torch.tensor([0, 9]), y)
    assert received[0][0] is x_t
    assert received[0][1] is y


def test_unknown_parameterizations_are_rejected():
    with pytest.raises(ValueError, match="prediction must be eps, x_start or v, not 'epsilon'"):
        DiscreteDenoiser(no_network, cosine_schedule(10), "epsilon", "fixed_small")
    with pytest.raises(ValueError, match="variance must be .*, not 'learned'"):
        DiscreteDenoiser(no_network, cosine_schedule(10), "eps", "learned")


@pytest.mark.parametrize("timestep_range", [1000, 4000.0, 50])
def test_the_network_is_told_timesteps_on_its_own_scale(timestep_range):
    told = []

    def network(x_t, t, y):
        told.append(t)
        return torch.zeros_like(x_t)

    schedule = respace(cosine_schedule(200), [0, 7, 199])
    denoiser = DiscreteDenoiser(network, schedule, "eps", "fixed_large", timestep_range)
    denoiser(torch.zeros(3, 1, 2, 2), torch.tensor([0, 1, 2]), None)
    torch.testing.assert_close(told[0], torch.tensor([0.0, 7.0, 199.0]) * timestep_range / 200)
