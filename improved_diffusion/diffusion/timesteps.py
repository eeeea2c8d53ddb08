"""Which timesteps to train on. Each sampler draws t with an importance weight 1 / (T p_t) that keeps the loss unbiased.

Sampling takes the generator; a sampler that learns keeps its history in `state_dict`, for checkpoints.
"""

from __future__ import annotations

import math
from typing import Protocol

import torch
from torch import Tensor


class TimestepSampler(Protocol):
    """Draws timesteps; all tensors on the CPU. One that `learns` wants an `update` after every step."""

    learns: bool

    def sample(self, n: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """n timesteps, int64 (n,), and their importance weights, float32 (n,)."""
        ...

    def update(self, t: Tensor, losses: Tensor) -> None:
        """Learn from the bound's terms `losses` (n,) at timesteps `t` (n,), of all processes in the same order."""
        ...

    def state_dict(self) -> dict[str, Tensor]: ...

    def load_state_dict(self, state: dict[str, Tensor]) -> None: ...


class UniformTimesteps:
    """Every t alike, drawn independently."""

    learns = False

    def __init__(self, timesteps: int):
        self.timesteps = timesteps

    def sample(self, n: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        return torch.randint(self.timesteps, (n,), generator=generator), torch.ones(n)

    def update(self, t: Tensor, losses: Tensor) -> None:
        """Nothing to learn."""

    def state_dict(self) -> dict[str, Tensor]:
        return {}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Nothing to load."""


class StratifiedTimesteps(UniformTimesteps):
    """Every t alike, but spread over a batch: one from each n-th of the range, in random order (less variance)."""

    def sample(self, n: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        u = (torch.arange(n) + torch.rand(n, generator=generator, dtype=torch.float64)) / n
        t = (u * self.timesteps).long().clamp(max=self.timesteps - 1)
        return t[torch.randperm(n, generator=generator)], torch.ones(n)


class LossSecondMomentTimesteps:
    """p_t proportional to sqrt(E[L_t^2]) over the last 10 losses at t (improved DDPM, equation 18).

    Uniform until every t has its 10 losses; then mixed with 0.001 of the uniform distribution. The term at t = T-1,
    which the capped beta of the cosine schedule can make thousands of times larger than all others together (see
    `bound_term`), counts no more than the largest of the others: else it alone would be drawn.
    """

    learns = True
    history_length = 10
    uniform_mix = 0.001

    def __init__(self, timesteps: int):
        self.timesteps = timesteps
        self.losses = torch.zeros(timesteps, self.history_length, dtype=torch.float64)
        self.counts = torch.zeros(timesteps, dtype=torch.int64)

    def probabilities(self) -> Tensor:
        """p_t, float64 (T,)."""
        if bool((self.counts < self.history_length).any()):
            return torch.full((self.timesteps,), 1 / self.timesteps, dtype=torch.float64)
        moments = self.losses.square().mean(1).sqrt().clamp(min=1e-12)
        if self.timesteps > 1:
            moments[-1] = moments[-1].clamp(max=moments[:-1].max())
        p = moments / moments.sum()
        return (1 - self.uniform_mix) * p + self.uniform_mix / self.timesteps

    def sample(self, n: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        p = self.probabilities()
        t = torch.multinomial(p, n, replacement=True, generator=generator)
        return t, (1 / (self.timesteps * p[t])).float()

    def update(self, t: Tensor, losses: Tensor) -> None:
        for step, loss in zip(t.tolist(), losses.tolist(), strict=True):
            if not math.isfinite(loss):  # the run stops by itself; the history must not be spoilt for its resume
                continue
            self.losses[step] = self.losses[step].roll(-1)
            self.losses[step, -1] = loss
            self.counts[step] = min(int(self.counts[step]) + 1, self.history_length)

    def state_dict(self) -> dict[str, Tensor]:
        return {"losses": self.losses.clone(), "counts": self.counts.clone()}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        if state["losses"].shape != self.losses.shape:
            raise ValueError(f"a history of {len(state['losses'])} timesteps cannot serve {self.timesteps}")
        if not state["losses"].isfinite().all():
            raise ValueError("the history of losses is not finite")
        self.losses.copy_(state["losses"])
        self.counts.copy_(state["counts"])


TIMESTEP_SAMPLERS = {
    "uniform": UniformTimesteps,
    "stratified": StratifiedTimesteps,
    "loss_second_moment": LossSecondMomentTimesteps,
}
