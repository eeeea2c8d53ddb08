"""Moments and moving averages divided among the processes: stage 1 of ZeRO (Rajbhandari et al. 2020, arXiv:1910.02054),
and the averages with it, which are more. Every process keeps all weights and gradients, and checkpoints are as ever."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from improved_diffusion.models.build import set_moments
from improved_diffusion.runtime.devices import Processes

Value = TypeVar("Value")
Averages = dict[str, dict[str, Tensor]]  # {rate: {parameter name: average}}


class Division:
    """Which process keeps the averages of which parameters: about as many numbers each, or, undivided, all in all."""

    def __init__(self, parameters: Mapping[str, nn.Parameter], processes: Processes, *, divided: bool):
        self.parameters = dict(parameters)
        self.processes = processes
        self.divided = divided and processes.world_size > 1
        loads = [0] * processes.world_size
        self.owner = {}
        for name in sorted(parameters, key=lambda name: -parameters[name].numel()):
            self.owner[name] = loads.index(min(loads))
            loads[self.owner[name]] += parameters[name].numel()

    def own(self, values: Mapping[str, Value]) -> dict[str, Value]:
        """Of `values` by parameter name those of this process; a name of no parameter is everyone's."""
        rank = self.processes.rank
        return {name: value for name, value in values.items() if not self.divided or self.owner.get(name, rank) == rank}

    def in_first(self, averages: Averages) -> Averages:
        """The `averages` of all processes, in the first, which writes checkpoints; in the others their own."""
        if not self.divided:
            return averages
        of_host = {rate: {name: tensor.cpu() for name, tensor in own.items()} for rate, own in averages.items()}
        parts = self.processes.gather_in_first(of_host)
        if parts is None:
            return averages
        return {rate: {name: parts[self.owner[name]][rate][name] for name in self.parameters} for rate in averages}

    def in_all(self, average: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """One whole average, in every process; each gives its own."""
        if not self.divided:
            return average
        return {
            name: self.processes.broadcast(average.get(name, torch.empty_like(parameter)), self.owner[name])
            for name, parameter in self.parameters.items()
        }

    def whole_state(self, optimizer: Any) -> dict[str, Any]:
        """The `state_dict` of an optimizer, which is divided too: in the first process; to be called in all."""
        if self.divided:
            optimizer.consolidate_state_dict()
            return optimizer.state_dict() if self.processes.is_first else {}
        return optimizer.state_dict()

    def load_state(self, optimizer: Any, state: dict[str, Any]) -> None:
        """Give an optimizer, in every process its share of it, the moments of `state`, which is of the whole.

        Raises ValueError where they are those of other parameters.
        """
        set_moments(optimizer, state)
        if self.divided:
            optimizer.state.clear()  # a second copy: what it steps with lies within it
