from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from improved_diffusion.diffusion.denoiser import NetworkDenoiser
from improved_diffusion.diffusion.parameterization import combine, q_sample
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
    level = schedule.at(t)
    abar = schedule.alphas_cumprod[t].item()
    eps = (x_t - abar**0.5 * x_start) / (1 - abar) ** 0.5
    outputs = {"eps": eps, "x_start": x_start, "v": abar**0.5 * eps - (1 - abar) ** 0.5 * x_start}
    for name, output in outputs.items():
        prediction = NetworkDenoiser(no_network, name, "fixed_small").interpret(x_t, level, output, None)
        torch.testing.assert_close(prediction.x_start, x_start, rtol=0, atol=1e-10)
        torch.testing.assert_close(prediction.eps, eps, rtol=0, atol=1e-10)


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_a_network_that_hits_its_target_knows_x_start_and_eps(prediction):
    schedule = cosine_schedule(50)
    denoiser = NetworkDenoiser(no_network, prediction, "fixed_small")
    generator = torch.Generator().manual_seed(0)
    x_start, noise = torch.randn(2, 50, 3, 4, 4, generator=generator, dtype=torch.float64)
    level = schedule.at(torch.arange(50))
    x_t = q_sample(level, x_start, noise)
    known = denoiser.interpret(x_t, level, combine(prediction, level, x_start, noise), None)
    torch.testing.assert_close(known.x_start, x_start, rtol=0, atol=1e-9)
    torch.testing.assert_close(known.eps, noise, rtol=0, atol=1e-9)


@pytest.mark.parametrize(("variance", "channels"), [("fixed_small", 3), ("fixed_large", 3), ("learned_range", 6)])
def test_network_output_is_split_and_read_in_float32(variance, channels):
    schedule = cosine_schedule(10)
    generator = torch.Generator().manual_seed(0)
    output = torch.randn(4, channels, 8, 8, generator=generator).bfloat16()
    denoiser = NetworkDenoiser(lambda x_t, t, y: output, "x_start", variance)
    t = torch.tensor([0, 3, 5, 9])
    prediction = denoiser(torch.zeros(4, 3, 8, 8), schedule.at(t), None)
    assert torch.equal(prediction.x_start, output[:, :3].float())
    small, large = (table[t].view(-1, 1, 1, 1) for table in (schedule.posterior_log_variance, schedule.betas.log()))
    expected = {
        "fixed_small": small,
        "fixed_large": schedule.fixed_large_variance.log()[t].view(-1, 1, 1, 1),
        "learned_range": small + (output[:, 3:].double() + 1) / 2 * (large - small),
    }[variance]
    assert prediction.log_variance.dtype == torch.float32
    torch.testing.assert_close(prediction.log_variance.double(), expected.expand(4, 3, 8, 8), rtol=1e-6, atol=1e-6)


def test_network_receives_x_t_and_classes_as_they_are():
    received = []

    def network(x_t, t, y):
        received.append((x_t, y))
        return x_t

    x_t, y = torch.randn(2, 3, 4, 4), torch.tensor([5, 6])
    denoiser = NetworkDenoiser(network, "eps", "fixed_small")
    denoiser(x_t, cosine_schedule(10).at(torch.tensor([0, 9])), y)
    assert received[0][0] is x_t
    assert received[0][1] is y


def test_unknown_parameterizations_are_rejected():
    with pytest.raises(ValueError, match="prediction must be one of eps, x_start, v, .* not 'epsilon'"):
        NetworkDenoiser(no_network, "epsilon", "fixed_small")
    with pytest.raises(ValueError, match="variance must be .*, not 'learned'"):
        NetworkDenoiser(no_network, "eps", "learned")


@pytest.mark.parametrize("timestep_range", [1000, 4000.0, 50])
def test_the_network_is_told_timesteps_on_its_own_scale(timestep_range):
    told = []

    def network(x_t, t, y):
        told.append(t)
        return torch.zeros_like(x_t)

    schedule = respace(cosine_schedule(200), [0, 7, 199])
    denoiser = NetworkDenoiser(network, "eps", "fixed_large", timestep_range)
    denoiser(torch.zeros(3, 1, 2, 2), schedule.at(torch.tensor([0, 1, 2])), None)
    torch.testing.assert_close(told[0], torch.tensor([0.0, 7.0, 199.0]) * timestep_range / 200)
