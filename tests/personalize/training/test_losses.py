"""Every formula by hand in float64, or against diffusers' schedulers."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from improved_diffusion.personalize.training.losses import (
    add_noise,
    dreambooth_loss,
    min_snr_weights,
    offset_noise,
    per_sample_loss,
    target,
)

ABAR = torch.cumprod(1 - torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2, 0)
T = torch.tensor([0, 300, 700, 999])


@pytest.fixture
def batch() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return tuple(torch.randn(4, 4, 6, 6, generator=generator, dtype=torch.float64) for _ in range(2))


def test_noise_and_velocity_are_those_of_diffusers(batch):
    diffusers = pytest.importorskip("diffusers")
    scheduler = diffusers.DDPMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
    latents, noise = batch
    close = {"rtol": 1e-4, "atol": 1e-5}  # its tables are float32
    torch.testing.assert_close(add_noise(latents, noise, T, ABAR), scheduler.add_noise(latents, noise, T), **close)
    velocity = target(latents, noise, T, ABAR, "v_prediction")
    torch.testing.assert_close(velocity, scheduler.get_velocity(latents, noise, T), **close)
    assert target(latents, noise, T, ABAR, "epsilon") is noise
    with pytest.raises(ValueError, match="epsilon or v_prediction"):
        target(latents, noise, T, ABAR, "sample")


def test_min_snr_makes_the_loss_on_x_0_what_the_paper_says(batch):
    """Its weight is min(SNR, gamma) on the error of x_0; an error of eps or v is another multiple of that error."""
    gamma = 5.0
    abar = ABAR[T]
    snr = abar / (1 - abar)
    wanted = snr.clamp(max=gamma)
    # x_0 = (x_t - sqrt(1 - abar) eps) / sqrt(abar) = sqrt(abar) x_t - sqrt(1 - abar) v
    of_eps, of_v = (1 - abar) / abar, 1 - abar
    torch.testing.assert_close(min_snr_weights(T, ABAR, gamma, "epsilon"), wanted * of_eps)
    torch.testing.assert_close(min_snr_weights(T, ABAR, gamma, "v_prediction"), wanted * of_v)


def test_min_snr_without_signal():
    ends_in_noise = torch.tensor([0.9, 0.0])
    weights = min_snr_weights(torch.tensor([0, 1]), ends_in_noise, 5.0, "v_prediction")
    assert torch.isfinite(weights).all()
    assert weights[1] == 0


@pytest.mark.parametrize("pairs", [1, 2])
def test_prior_and_min_snr_by_hand(pairs):
    """Instances first, prior images after them, as in a batch of DreamBooth; each with a timestep of its own."""
    rng = np.random.default_rng(0)
    n = 2 * pairs
    predicted, expected = rng.normal(size=(2, n, 4, 3, 3))
    t = rng.integers(0, 1000, n)
    by_hand = []
    for i in range(n):
        abar = float(ABAR[t[i]])
        snr = abar / (1 - abar)
        by_hand.append(min(snr, 5.0) / snr * ((predicted[i] - expected[i]) ** 2).mean())
    hand = np.mean(by_hand[:pairs]) + 0.7 * np.mean(by_hand[pairs:])
    losses = per_sample_loss(torch.from_numpy(predicted), torch.from_numpy(expected))
    weights = min_snr_weights(torch.from_numpy(t), ABAR, 5.0, "epsilon")
    assert dreambooth_loss(losses, weights, pairs, 0.7).item() == pytest.approx(hand, rel=1e-6)


def test_masks_by_hand():
    rng = np.random.default_rng(0)
    predicted, expected = rng.normal(size=(2, 3, 4, 3, 5))
    mask = rng.uniform(size=(3, 1, 3, 5))
    mask[2] = 0
    by_hand = []
    for i in range(2):
        total = weight = 0.0
        for channel in range(4):
            for y in range(3):
                for x in range(5):
                    total += mask[i, 0, y, x] * (predicted[i, channel, y, x] - expected[i, channel, y, x]) ** 2
                    weight += mask[i, 0, y, x]
        by_hand.append(total / weight)
    found = per_sample_loss(*map(torch.from_numpy, (predicted, expected, mask)))
    assert found.tolist() == pytest.approx([*by_hand, 0.0], rel=1e-5)


def test_without_a_prior_or_weights_it_is_the_mean():
    losses = torch.tensor([1.0, 3.0])
    assert dreambooth_loss(losses, None, 2, 0.5).item() == 2


def test_offset_noise_has_the_variance_of_both_parts():
    noise = torch.zeros(2000, 4, 3, 3)
    shifted = offset_noise(noise, 0.1, torch.Generator().manual_seed(0))
    assert (shifted == shifted[..., :1, :1]).all()
    assert shifted[..., 0, 0].std().item() == pytest.approx(0.1, rel=0.05)
