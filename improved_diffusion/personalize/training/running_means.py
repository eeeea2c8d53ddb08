"""Means of what updates report, between two lines of the log; kept on the device so that no update waits for them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


class RunningMeans:
    """Means of named scalars since the last `flush`."""

    def __init__(self, device: torch.device):
        self.device = device
        self.sums: dict[str, Tensor] = {}
        self.count = 0

    def add(self, terms: dict[str, Tensor]) -> None:
        """Count the terms of an update; the same names each time."""
        for name, value in terms.items():
            self.sums[name] = self.sums.get(name, 0) + value
        self.count += 1

    def are_finite(self, names: Sequence[str]) -> bool:
        """Whether these scalars of all updates since the last `flush` were finite: one that is not makes the sum so."""
        sums = [self.sums[name] for name in names if name in self.sums]
        return not sums or bool(torch.stack(sums).isfinite().all())

    def flush(self) -> dict[str, float]:
        """The means since the last call, and start anew."""
        sums, count = self.sums, self.count
        self.sums, self.count = {}, 0
        return dict(zip(sums, (torch.stack([*sums.values()]) / count).tolist(), strict=True)) if sums else {}

    def state_dict(self) -> dict[str, Any]:
        """What has been counted since the last `flush`: tensors and plain values."""
        return {"sums": dict(self.sums), "count": self.count}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on counting from `state`. Raises ValueError where it is no such thing."""
        if type(state["count"]) is not int or state["count"] < 0 or any(map(torch.Tensor.dim, state["sums"].values())):
            raise ValueError("its running means are no scalars")
        self.sums = {name: total.to(self.device) for name, total in state["sums"].items()}
        self.count = state["count"]
