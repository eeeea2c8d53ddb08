"""The optimizers of a run, and their learning rate at each step."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from improved_diffusion.config import TrainingConfig
from improved_diffusion.models.backbone import Backbone

Optimizers = dict[str, torch.optim.Optimizer]


def make_optimizers(training: TrainingConfig, network: Backbone, *, divided: bool = False) -> Optimizers:
    """AdamW as "optimizer", the name that it has in checkpoints; with `training.optimizer` muon also Muon (Jordan et
    al. 2024) for the network's hidden matrices, which AdamW then leaves alone.

    Muon's updates are scaled to the size of AdamW's (Liu et al. 2025, arXiv:2502.16982), so that one learning rate and
    one weight decay serve both. Where they are `divided`, a process keeps the moments of its share of the parameters,
    takes the steps of these, and sends them to the others.
    """
    shared = {"lr": training.lr, "weight_decay": training.weight_decay}
    matrices = network.hidden_matrices() if training.optimizer == "muon" else []
    taken = set(map(id, matrices))
    rest = [parameter for parameter in network.parameters() if id(parameter) not in taken]

    def make(kind: type[torch.optim.Optimizer], parameters: list[Tensor], **own: Any) -> torch.optim.Optimizer:
        if divided:
            from torch.distributed.optim import ZeroRedundancyOptimizer  # which takes seconds

            return ZeroRedundancyOptimizer(parameters, kind, **shared, **own)
        return kind(parameters, **shared, **own)

    optimizers = {"optimizer": make(torch.optim.AdamW, rest, betas=training.betas, eps=training.eps, fused=True)}
    if matrices:
        optimizers["muon"] = make(torch.optim.Muon, matrices, adjust_lr_fn="match_rms_adamw")
    return optimizers


def learning_rate(training: TrainingConfig, step: int) -> float:
    """The learning rate of optimizer step `step`, counted from 0."""
    schedule = (training.lr_schedule, step, training.steps, training.warmup_steps, training.cooldown)
    return training.lr * rate_factor(*schedule)


def rate_factor(schedule: str, step: int, steps: int, warmup_steps: int, cooldown: float) -> float:
    """The share of the highest learning rate that step `step` of `steps`, counted from 0, has.

    It rises linearly over the first `warmup_steps`. Then it is constant; or falls to 0 along half a cosine (Loshchilov
    & Hutter 2017, arXiv:1608.03983); or is constant up to the last share `cooldown` of all steps, in which it falls
    linearly (warm-up, stable, decay: Hu et al. 2024, arXiv:2404.06395). The last step's is the last above 0.
    """
    warm = min(1.0, (step + 1) / max(1, warmup_steps))
    if schedule == "cosine":
        done = (step - warmup_steps) / max(1, steps - warmup_steps)
        decayed = (1 + math.cos(math.pi * max(0.0, done))) / 2
    elif schedule == "wsd":
        decayed = min(1.0, (steps - step) / (cooldown * steps))
    else:
        decayed = 1.0
    return min(warm, decayed)
