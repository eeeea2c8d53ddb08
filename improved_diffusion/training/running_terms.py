"""Averages of the loss terms between two lines of the log, kept on the device so that no step waits for them."""

from __future__ import annotations

import torch
from torch import Tensor

from improved_diffusion.diffusion.losses import LossTerms
from improved_diffusion.training.devices import Processes


class RunningTerms:
    """Means of loss, mse and vlb, over all t and over each quartile of t, since the last `flush`.

    Where the loss has a bound, its term at t = T-1 is kept apart, as `vlb_last_step`, and left out of the means of
    `loss` and `vlb`: under the cosine schedule it can be thousands of times all others together (see `bound_term`),
    and one such image would hide the curve.
    """

    names = ("loss", "mse", "vlb")

    def __init__(self, timesteps: int, device: torch.device):
        self.timesteps = timesteps
        # Rows: the quartiles of t, then t = T-1. Columns: sums of loss, mse, vlb; then the weight.
        self.sums = torch.zeros(5, 4, device=device, dtype=torch.float64)
        self.grad_norm = torch.zeros(2, device=device, dtype=torch.float64)
        self.has_bound = False

    def add(self, terms: LossTerms, t: Tensor, weights: Tensor) -> None:
        """Count the terms of the images at timesteps `t`, drawn with importance weights `weights`.

        Weighted, the means are over uniform t however the timesteps are drawn.
        """
        vlb = torch.zeros_like(terms.mse) if terms.vlb is None else terms.vlb
        self.has_bound = terms.vlb is not None
        values = (
            torch.stack([terms.loss, terms.mse, vlb, torch.ones_like(vlb)], dim=1).detach().double() * weights[:, None]
        )
        row = t * 4 // self.timesteps
        if self.has_bound and self.timesteps > 1:
            row = torch.where(t == self.timesteps - 1, 4, row)
        self.sums.index_add_(0, row, values)

    def add_grad_norm(self, norm: Tensor) -> None:
        """Count the gradient norm of a step."""
        self.grad_norm += torch.stack([norm.detach().double(), torch.ones_like(norm, dtype=torch.float64)])

    def state_dict(self, processes: Processes) -> dict[str, Tensor]:
        """What has been counted since the last `flush`, of each process apart; to be called in all of them."""
        return {"sums": processes.concatenate(self.sums[None]), "grad_norm": self.grad_norm.clone()}

    def load_state_dict(self, state: dict[str, Tensor], processes: Processes) -> None:
        """Go on counting from `state`. The first process takes all of it where their number was another one."""
        sums = state["sums"]
        if len(sums) != processes.world_size:
            sums = torch.cat([sums.sum(0, keepdim=True), sums.new_zeros(processes.world_size - 1, *self.sums.shape)])
        self.sums.copy_(sums[processes.rank])
        self.grad_norm.copy_(state["grad_norm"])

    def are_finite(self, processes: Processes) -> bool:
        """Whether everything counted so far is finite, in every process."""
        return bool(torch.isfinite(processes.total(self.sums).sum() + processes.total(self.grad_norm).sum()))

    def flush(self, processes: Processes) -> dict[str, float]:
        """The means over all processes since the last call, and start anew. A mean of nothing is left out."""
        sums, (norms, steps) = processes.total(self.sums).tolist(), self.grad_norm.tolist()
        has_bound = self.has_bound
        self.sums.zero_()
        self.grad_norm.zero_()
        means: dict[str, float] = {}
        rows = {"": [sum(column) for column in zip(*sums[:4], strict=True)]}
        rows.update({f"_q{quartile}": sums[quartile] for quartile in range(4)})
        for suffix, (*totals, count) in rows.items():
            if count:
                means.update({name + suffix: total / count for name, total in zip(self.names, totals, strict=True)})
        if sums[4][3]:
            means["vlb_last_step"] = sums[4][2] / sums[4][3]
        if steps:
            means["grad_norm"] = norms / steps
        return means if has_bound else {name: mean for name, mean in means.items() if not name.startswith("vlb")}
