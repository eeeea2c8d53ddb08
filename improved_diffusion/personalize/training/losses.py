"""The training loss: mean-square error against noise or velocity, weighted by min-SNR, with a prior to preserve."""

from __future__ import annotations

import torch
from torch import Tensor


def target(latents: Tensor, noise: Tensor, t: Tensor, alphas_cumprod: Tensor, prediction: str) -> Tensor:
    """What the network should predict: the noise, or the velocity sqrt(abar) noise - sqrt(1 - abar) latents (Salimans &
    Ho 2022, arXiv:2202.00512, appendix D).

    Args:
        latents, noise: (N, C, H, W). t: (N,) timesteps. alphas_cumprod: (T,).
        prediction: `epsilon` or `v_prediction`, the scheduler's `prediction_type`.

    Raises:
        ValueError: another prediction.
    """
    if prediction == "epsilon":
        return noise
    if prediction == "v_prediction":
        abar = alphas_cumprod[t].view(-1, 1, 1, 1)
        return abar.sqrt() * noise - (1 - abar).sqrt() * latents
    raise ValueError(f"no prediction {prediction!r}: epsilon or v_prediction")


def add_noise(latents: Tensor, noise: Tensor, t: Tensor, alphas_cumprod: Tensor) -> Tensor:
    """x_t = sqrt(abar) latents + sqrt(1 - abar) noise."""
    abar = alphas_cumprod[t].view(-1, 1, 1, 1)
    return abar.sqrt() * latents + (1 - abar).sqrt() * noise


def min_snr_weights(t: Tensor, alphas_cumprod: Tensor, gamma: float, prediction: str) -> Tensor:
    """(N,): min(SNR, gamma) over SNR for noise, over SNR + 1 for velocity, with SNR = abar / (1 - abar) (Hang et al.
    2023, arXiv:2303.09556, section 3.4)."""
    abar = alphas_cumprod[t]
    snr = abar / (1 - abar)
    # The SNR of the last step of a schedule rescaled to end in pure noise is 0, and so is the weight of its velocity.
    return snr.clamp(max=gamma) / (snr + 1 if prediction == "v_prediction" else snr.clamp(min=1e-8))


def per_sample_loss(predicted: Tensor, expected: Tensor, mask: Tensor | None = None) -> Tensor:
    """(N,): the mean-square error of each sample, in float32 whatever the network computed in.

    With a `mask`, (N, 1, H, W) of weights from 0 to 1, it is the weighted mean, sum(mask * error) / sum(mask): a small
    subject counts as much as a large one. (kohya's scripts divide by the number of all latents instead.) 0 where the
    mask is 0 all over."""
    errors = (predicted.float() - expected.float()).square()
    if mask is None:
        return errors.flatten(1).mean(dim=1)
    weighted, area = (errors * mask).flatten(1).sum(dim=1), mask.flatten(1).sum(dim=1) * errors.shape[1]
    return torch.where(area > 0, weighted / area.clamp(min=1e-8), 0.0)


def dreambooth_loss(losses: Tensor, weights: Tensor | None, instances: int, prior_weight: float) -> Tensor:
    """The loss of a batch of instances and prior images (Ruiz et al. 2022, DreamBooth, arXiv:2208.12242, equation 2):

        mean over the instances + prior_weight * mean over the prior images

    Each sample is weighted before the two are told apart, so that a weight is that of its own timestep.

    Args:
        losses: (N,). weights: (N,), or None for ones. instances: how many are no prior images; they come first.
        prior_weight: of the second mean.
    """
    if weights is not None:
        losses = losses * weights
    loss, of_prior = losses[:instances].mean(), losses[instances:]
    return loss + prior_weight * of_prior.mean() if len(of_prior) else loss


def offset_noise(noise: Tensor, strength: float, generator: torch.Generator) -> Tensor:
    """Noise with a constant added to each channel of each sample, so that the network learns to move an image's mean
    (N. Guttenberg 2023, "Diffusion with Offset Noise"). (N, C, H, W) to the same; drawn on the CPU."""
    shift = torch.randn(*noise.shape[:2], 1, 1, generator=generator).to(noise)
    return noise + strength * shift
