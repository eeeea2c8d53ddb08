"""The optimizers of a run, from their libraries, and the learning rate at each update."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from improved_diffusion.models.build import set_moments
from improved_diffusion.personalize.config import PersonalizeConfig, TrainingConfig
from improved_diffusion.training.optimization import rate_factor

# Bytes of an optimizer's state for each number that is trained.
STATE_BYTES = {"adamw": 8.0, "adamw_8bit": 2.0, "paged_adamw_8bit": 0.0, "lion": 4.0, "prodigy": 16.0}
LIBRARIES = {"adamw_8bit": "bitsandbytes", "paged_adamw_8bit": "bitsandbytes"}  # that are installed apart


def make_optimizer(parts: dict[str, Sequence[nn.Parameter]], config: PersonalizeConfig) -> torch.optim.Optimizer:
    """The optimizer of a run, with a group for each part, whose `peak_lr` is what its learning rate is a share of.

    Args:
        parts: {component: its parameters}.
        config: of the run.

    Raises:
        ModuleNotFoundError: the optimizer's library is not installed.
    """
    training = config.training
    groups = [
        {"params": list(parameters), "lr": rate, "peak_lr": rate}
        for parameters, rate in ((parameters, learning_rate(config, part)) for part, parameters in parts.items())
    ]
    decay = {"weight_decay": training.weight_decay}
    if training.optimizer == "adamw":
        return torch.optim.AdamW(groups, **decay, fused=True)
    if training.optimizer == "adafactor":  # Shazeer & Stern 2018, arXiv:1804.04235
        from transformers.optimization import Adafactor

        # With learning rates that mean what AdamW's do. PyTorch's own multiplies them by the size of the weights, with
        # which an adapter, whose weights begin at 0, would hardly move.
        return Adafactor(groups, **decay, scale_parameter=False, relative_step=False, warmup_init=False)
    if training.optimizer == "lion":  # Chen et al. 2023, arXiv:2302.06675
        from lion_pytorch import Lion

        return Lion(groups, **decay)
    if training.optimizer == "prodigy":  # Mishchenko & Defazio 2023, arXiv:2306.06101
        from prodigyopt import Prodigy

        # As its authors advise for diffusion models.
        return Prodigy(groups, **decay, use_bias_correction=True, safeguard_warmup=training.warmup_steps > 0)
    import bitsandbytes

    kinds = {"adamw_8bit": bitsandbytes.optim.AdamW8bit, "paged_adamw_8bit": bitsandbytes.optim.PagedAdamW8bit}
    return kinds[training.optimizer](groups, **decay)


def state_bytes(kind: str, parameter: Tensor) -> float:
    """What an optimizer keeps of a parameter: Adafactor a row and a column of each of its matrices, which of a
    convolution are as small as its kernel."""
    if kind != "adafactor":
        return STATE_BYTES[kind] * parameter.numel()
    sides = [1 / side for side in parameter.shape[-2:]] if parameter.dim() > 1 else [1.0]
    return 4 * parameter.numel() * sum(sides)


class FusedBackward:
    """Lets an optimizer update each parameter in the backward pass, once its gradient is there, and drops that. The
    updates are those of `optimizer.step()`, for optimizers in which no parameter asks for another's gradient.

    Args:
        optimizer: whose state and learning rates are used.
        share: what averages gradients over processes, in place.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, share: Callable[[list[nn.Parameter]], None]):
        self.optimizer, self.share = optimizer, share
        self._squares: Tensor | float = 0.0
        for number, group in enumerate(optimizer.param_groups):
            for parameter in group["params"]:
                parameter.register_post_accumulate_grad_hook(functools.partial(self._update, number))

    def _update(self, group: int, parameter: nn.Parameter) -> None:
        self.share([parameter])
        self._squares = self._squares + parameter.grad.float().square().sum()
        groups = self.optimizer.param_groups
        self.optimizer.param_groups = [{**groups[group], "params": [parameter]}]
        self.optimizer.step()
        self.optimizer.param_groups = groups
        parameter.grad = None

    def gradient_norm(self) -> Tensor:
        """Of all gradients since the last call."""
        squares, self._squares = self._squares, 0.0
        return torch.as_tensor(squares).sqrt()


def restore(optimizer: torch.optim.Optimizer, kind: str, state: dict[str, Any]) -> None:
    """Give an optimizer of this kind the `state` that its state_dict was.

    Raises:
        ValueError, KeyError, RuntimeError: it is that of other parameters or of another kind.
    """
    if kind == "adamw":
        set_moments(optimizer, state)
    else:
        optimizer.load_state_dict(state)


def learning_rate(config: PersonalizeConfig, part: str) -> float:
    """The highest of a component; with textual inversion `training.lr`, as embeddings are all that is trained, and with
    Prodigy, which knows one for all."""
    training = config.training
    if config.method == "textual_inversion" or training.optimizer == "prodigy":
        return training.lr
    second = training.lr_text_encoder if training.lr_text_encoder_2 is None else training.lr_text_encoder_2
    return {"unet": training.lr, "text_encoder": training.lr_text_encoder, "text_encoder_2": second}[part]


def set_rates(optimizer: torch.optim.Optimizer, training: TrainingConfig, step: int, updates: int) -> None:
    """Give all groups their learning rates of update `step`, counted from 0, of so many `updates`."""
    share = rate_share(training, step, updates)
    for group in optimizer.param_groups:
        group["lr"] = group["peak_lr"] * share


def rate_share(training: TrainingConfig, step: int, updates: int) -> float:
    """What a learning rate is at update `step` of so many, as a share of the highest."""
    return rate_factor(training.lr_schedule, step, updates, training.warmup_steps, training.cooldown)
