"""Samplers: functions (denoiser, x_T, y, draw_noise, ...) -> x_0, over the one denoiser contract.

They visit every timestep of the denoiser's schedule; respace the schedule for fewer steps. `x_T` is standard normal
noise, (N, C, H, W); `draw_noise` returns fresh noise of that shape, and is called once in each step that needs it.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from improved_diffusion.diffusion import process
from improved_diffusion.diffusion.denoiser import Denoiser


@torch.no_grad()
def ancestral(
    denoiser: Denoiser, x_T: Tensor, y: Tensor | None, draw_noise: Callable[[], Tensor], *, clip: bool = True
) -> Tensor:
    """Draw x_{t-1} from p(x_{t-1} | x_t), from t = T-1 down to 0 (DDPM, algorithm 2).

    Args:
        denoiser: the model.
        x_T: (N, C, H, W), where to start.
        y: (N,) classes, or None.
        draw_noise: returns noise of the shape of `x_T`.
        clip: clamp the predicted x_0 to [-1, 1], the range of images.
    """
    schedule, x = denoiser.schedule, x_T
    for step in reversed(range(len(schedule))):
        t = torch.full((len(x),), step, device=x.device)
        prediction = denoiser(x, t, y)
        x_start = prediction.x_start.clamp(-1, 1) if clip else prediction.x_start
        x = process.q_posterior_mean(schedule, x_start, x, t)
        if step > 0:
            x = x + torch.exp(0.5 * prediction.log_variance) * draw_noise()
    return x


@torch.no_grad()
def ddim(
    denoiser: Denoiser,
    x_T: Tensor,
    y: Tensor | None,
    draw_noise: Callable[[], Tensor],
    *,
    clip: bool = True,
    eta: float = 0.0,
) -> Tensor:
    """DDIM (Song et al. 2020, arXiv:2010.02502, equation 12): deterministic at eta = 0, DDPM-like at eta = 1.

    Arguments as for `ancestral`.

    Raises:
        ValueError: `eta` is not between 0 and 1.
    """
    if not 0 <= eta <= 1:
        raise ValueError(f"eta must be between 0 and 1, not {eta}")
    schedule, x = denoiser.schedule, x_T
    # In float64: where a respaced step is long, 1 - abar_{t-1} - sigma^2 is a difference of nearly equal numbers.
    signal = schedule.alphas_cumprod_prev.sqrt()
    sigma = eta * schedule.posterior_variance.sqrt()
    direction = (1 - schedule.alphas_cumprod_prev - sigma**2).clamp(min=0).sqrt()
    for step in reversed(range(len(schedule))):
        t = torch.full((len(x),), step, device=x.device)
        prediction = denoiser(x, t, y)
        x_start, eps = prediction.x_start, prediction.eps
        if clip:
            x_start = x_start.clamp(-1, 1)
            eps = process.eps_from_x_start(schedule, x, t, x_start)
        x = process.at(signal, t, x) * x_start + process.at(direction, t, x) * eps
        if eta > 0 and step > 0:
            x = x + process.at(sigma, t, x) * draw_noise()
    return x


SAMPLERS = {"ancestral": ancestral, "ddim": ddim}
