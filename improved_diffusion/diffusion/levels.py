"""Which noise levels to train on: of a process of T steps an index t in 0..T-1, in continuous time a level t in [0, 1].

Each draw has an importance weight: 1 / (T p_t) where a sampler prefers some t and the loss is to stay what it is, and 1
where the preference is part of the objective. Sampling takes the generator; a sampler that learns keeps its history in
`state_dict`, for checkpoints.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

from improved_diffusion.diffusion.process import Process
from improved_diffusion.runtime.devices import upload


class LevelSampler(Protocol):
    """Draws levels, on the CPU or on its device. One that `learns` wants an `update` after every step."""

    learns: bool

    def sample(self, n: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """n levels, int64 or float64 (n,), and their importance weights, float32 (n,)."""
        ...

    def update(self, t: Tensor, losses: Tensor) -> None:
        """Learn from the bound's terms `losses` (n,) at timesteps `t` (n,), of all processes in the same order."""
        ...

    def state_dict(self) -> dict[str, Tensor]: ...

    def load_state_dict(self, state: dict[str, Tensor]) -> None: ...


class _Memoryless:
    learns = False

    def update(self, t: Tensor, losses: Tensor) -> None:
        """Nothing to learn."""

    def state_dict(self) -> dict[str, Tensor]:
        return {}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Nothing to load."""


class UniformTimesteps(_Memoryless):
    """Every t of 0..T-1 alike, drawn independently."""

    def __init__(self, timesteps: int):
        self.timesteps = timesteps

    def sample(self, n: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        return torch.randint(self.timesteps, (n,), generator=generator), torch.ones(n)


class DrawnLevels(_Memoryless):
    """Levels as `draw` gives them, up to the process's last one; of a process of T steps, the step of each level."""

    def __init__(self, process: Process, draw: Draw):
        self.process = process
        self.draw = draw

    def sample(self, n: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        t = self.draw(self.process, n, generator).clamp(max=self.process.last_level)
        timesteps = self.process.timesteps
        if timesteps is not None:
            t = (t * timesteps).long().clamp(max=timesteps - 1)
        return t, torch.ones(n)


Draw = Callable[[Process, int, torch.Generator], Tensor]


def uniform(process: Process, n: int, generator: torch.Generator) -> Tensor:
    """Every t alike, drawn independently."""
    return torch.rand(n, generator=generator, dtype=torch.float64)


def stratified(process: Process, n: int, generator: torch.Generator) -> Tensor:
    """Every t alike, but spread over a batch: one from each n-th of the range, in random order (less variance)."""
    u = (torch.arange(n) + torch.rand(n, generator=generator, dtype=torch.float64)) / n
    return u[torch.randperm(n, generator=generator)]


def log_normal(process: Process, n: int, generator: torch.Generator, mean: float = -1.2, std: float = 1.2) -> Tensor:
    """ln(sigma / signal) ~ N(mean, std^2) (EDM: Karras et al. 2022, arXiv:2206.00364, table 1); of a process of T
    steps, that of the nearest step."""
    t = process.level_of(torch.exp(mean + std * torch.randn(n, generator=generator, dtype=torch.float64)))
    # Step k has the level (k + 1) / T and is drawn for the t from k / T on: half a step lower, it is the nearest one.
    return t if process.timesteps is None else (t - 0.5 / process.timesteps).clamp(min=0)


def logit_normal(process: Process, n: int, generator: torch.Generator, mean: float = 0.0, std: float = 1.0) -> Tensor:
    """ln(t / (1 - t)) ~ N(mean, std^2) (Esser et al. 2024, arXiv:2403.03206, equation 19)."""
    return torch.sigmoid(mean + std * torch.randn(n, generator=generator, dtype=torch.float64))


class LossSecondMomentTimesteps:
    """p_t proportional to sqrt(E[L_t^2]) over the last 10 losses at t (improved DDPM, equation 18).

    Uniform until every t has its 10 losses; then mixed with 0.001 of the uniform distribution. The term at t = T-1,
    which the capped beta of the cosine schedule can make thousands of times larger than all others together (see
    `bound_term`), counts no more than the largest of the others: else it alone would be drawn.
    """

    learns = True
    history_length = 10
    uniform_mix = 0.001

    def __init__(self, timesteps: int, device: torch.device | str = "cpu"):
        self.timesteps = timesteps
        self.device = device
        self.losses = torch.zeros(timesteps, self.history_length, dtype=torch.float64, device=device)
        self.counts = torch.zeros(timesteps, dtype=torch.int64, device=device)

    def probabilities(self) -> Tensor:
        """p_t, float64 (T,)."""
        moments = self.losses.square().mean(1).sqrt().clamp(min=1e-12)
        if self.timesteps > 1:
            moments[-1] = torch.minimum(moments[-1], moments[:-1].max())
        p = moments / moments.sum()
        learnt = (1 - self.uniform_mix) * p + self.uniform_mix / self.timesteps
        return torch.where((self.counts >= self.history_length).all(), learnt, 1 / self.timesteps)

    def sample(self, n: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        p = self.probabilities()
        u = upload(torch.rand(n, generator=generator, dtype=torch.float64), self.device)
        cumulative = p.cumsum(0)
        t = torch.searchsorted(cumulative / cumulative[-1], u)
        return t, (1 / (self.timesteps * p[t])).float()

    def update(self, t: Tensor, losses: Tensor) -> None:
        # A loss that is not finite stops the run, and must not spoil the history for its resume. What is not kept goes
        # into a further row: to leave it out would mean to wait for the device to count it.
        length, nowhere = self.history_length, self.timesteps
        t, order = torch.where(losses.isfinite(), t, nowhere).sort(stable=True)
        added = torch.zeros(nowhere + 1, dtype=torch.int64, device=t.device).index_add_(0, t, torch.ones_like(t))
        # Each history moves on by as many places as it gets losses, and its losses fill them, the last one the last.
        kept = torch.arange(length, device=t.device) + added[:nowhere, None]
        table = torch.cat([self.losses.gather(1, kept.clamp(max=length - 1)), self.losses.new_zeros(1, length)])
        place = length + torch.arange(len(t), device=t.device) - added.cumsum(0)[t]
        table[torch.where(place >= 0, t, nowhere), place.clamp(min=0)] = losses[order].double()
        self.losses = table[:nowhere]
        self.counts = (self.counts + added[:nowhere]).clamp(max=length)

    def state_dict(self) -> dict[str, Tensor]:
        return {"losses": self.losses.clone(), "counts": self.counts.clone()}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        if state["losses"].shape != self.losses.shape:
            raise ValueError(f"a history of {len(state['losses'])} timesteps cannot serve {self.timesteps}")
        if not state["losses"].isfinite().all():
            raise ValueError("the history of losses is not finite")
        self.losses.copy_(state["losses"])
        self.counts.copy_(state["counts"])


DRAWS: dict[str, Draw] = {
    "uniform": uniform,
    "stratified": stratified,
    "log_normal": log_normal,
    "logit_normal": logit_normal,
}
LEVEL_SAMPLERS = (*DRAWS, "loss_second_moment")


def make_level_sampler(name: str, process: Process, device: torch.device | str = "cpu") -> LevelSampler:
    """The sampler of that name, one of LEVEL_SAMPLERS. One that learns does so on `device`, where the losses are.

    Raises:
        ValueError: `loss_second_moment` in continuous time, where there are no T terms to remember.
    """
    if name == "loss_second_moment":
        if process.timesteps is None:
            raise ValueError("loss_second_moment remembers the losses of T steps: it needs a process of T steps")
        return LossSecondMomentTimesteps(process.timesteps, device)
    if name == "uniform" and process.timesteps is not None:
        return UniformTimesteps(process.timesteps)
    return DrawnLevels(process, DRAWS[name])
