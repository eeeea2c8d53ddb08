"""Exponential moving averages of a model's parameters, several rates at once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn


class EMA:
    """Float32 averages of `parameters`, {name: parameter}, one set for each rate.

    The averages start as the parameters are now, and live on the same device. Of a model give the bare network's
    `named_parameters()`: neither compiled nor wrapped for distributed training, so that the names are its own.

    Raises ValueError for a rate outside [0, 1), or one given twice.
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter], rates: Sequence[float] = (0.999, 0.9999)):
        self.rates = tuple(rates)
        if len(set(self.rates)) < len(self.rates) or not all(0 <= rate < 1 for rate in self.rates):
            raise ValueError(f"EMA rates must be different from each other and in [0, 1), not {self.rates}")
        self._parameters = dict(parameters)
        self._averages = {
            rate: {name: p.detach().to(torch.float32, copy=True) for name, p in self._parameters.items()}
            for rate in self.rates
        }

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Take in the parameters as they are after optimizer step `step`, counted from 0:
        average <- decay * average + (1 - decay) * parameter.
        """
        parameters = [p.float() for p in self._parameters.values()]
        for rate, average in self._averages.items():
            torch._foreach_lerp_(list(average.values()), parameters, 1 - self.decay(rate, step))

    def decay(self, rate: float, step: int) -> float:
        """min(rate, (1 + step) / (10 + step)): the warm-up of TensorFlow's `ExponentialMovingAverage(num_updates=...)`,
        without which the random initial weights would outweigh the rest for the first 1 / (1 - rate) steps.
        """
        return min(rate, (1 + step) / (10 + step))

    def weights(self, rate: float) -> dict[str, Tensor]:
        """The averages of one rate by parameter name, as `load_state_dict` of a model takes them; not copies.

        Raises ValueError for a rate that is not kept.
        """
        if rate not in self._averages:
            raise ValueError(f"no average with rate {rate}; there are {self.rates}")
        return self._averages[rate]

    def state_dict(self) -> dict[str, dict[str, Tensor]]:
        """{str(rate): {parameter name: average}}; not copies."""
        return {str(rate): dict(average) for rate, average in self._averages.items()}

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, dict[str, Tensor]]) -> None:
        """Copy in what `state_dict` gave. Raises ValueError where rates, names or shapes differ."""
        if set(state) != {str(rate) for rate in self.rates}:
            raise ValueError(f"the saved EMA rates are {sorted(state)}, but this run keeps {self.rates}")
        for rate, average in self._averages.items():
            saved = state[str(rate)]
            if {n: t.shape for n, t in saved.items()} != {n: t.shape for n, t in average.items()}:
                raise ValueError(f"the saved EMA of rate {rate} is of a model with other parameters")
            for name, tensor in average.items():
                tensor.copy_(saved[name])
