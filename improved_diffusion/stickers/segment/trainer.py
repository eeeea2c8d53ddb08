"""One update of a cut-out's network, and everything that it changes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from improved_diffusion.checkpoint_file import DAMAGE
from improved_diffusion.errors import UserError
from improved_diffusion.models.build import set_moments
from improved_diffusion.models.ema import EMA
from improved_diffusion.personalize.training.running_means import RunningMeans
from improved_diffusion.runtime.devices import arithmetic, upload, with_autocast
from improved_diffusion.stickers.segment.config import SegmentConfig
from improved_diffusion.stickers.segment.models import build_network, cutout_loss, learned, set_learned
from improved_diffusion.training.optimization import learning_rate


class Trainer:
    """A network in training. `step` counts the updates, `seconds` the time that they and their pictures took.

    Raises:
        UserError: see `build_network`.
    """

    def __init__(self, config: SegmentConfig, device: torch.device, *, new: bool):
        self.config, self.device = config, device
        self.network = build_network(config.model, config.seed, pretrained=new).to(device)
        training = config.training
        self.run_network = with_autocast(self.network, device, arithmetic(training.precision, device))
        self.optimizer = torch.optim.AdamW(
            self.network.parameters(), lr=training.lr, weight_decay=training.weight_decay, fused=True
        )
        self.ema = EMA(learned(self.network), [training.ema_rate])
        self.means = RunningMeans(device)
        self.step, self.seconds = 0, 0.0

    def train_step(self, pictures: Tensor, alpha: Tensor) -> None:
        """One update. `pictures`: uint8 (N, 3, H, W), `alpha`: uint8 (N, H, W)."""
        training = self.config.training
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(training, self.step)
        self.network.train()
        pictures = upload(pictures, self.device).contiguous(memory_format=torch.channels_last)
        terms = cutout_loss(self.run_network(pictures), upload(alpha, self.device) / 255)
        self.optimizer.zero_grad()
        terms["loss"].backward()
        norm = torch.nn.utils.clip_grad_norm_(self.network.parameters(), training.grad_clip)
        self.means.add({**{name: term.detach() for name, term in terms.items()}, "grad_norm": norm})
        self.optimizer.step()
        self.ema.update(self.step)
        self.step += 1

    def state_dict(self) -> dict[str, Any]:
        """All that a resumed run needs: tensors and plain values."""
        return {
            "step": self.step,
            "images_seen": self.step * self.config.training.batch_size,
            "seconds": self.seconds,
            "model": learned(self.network),
            "ema": self.ema.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "running_means": self.means.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from `state`.

        Raises:
            UserError: it is that of another architecture, or of other settings.
        """
        set_learned(self.network, state["model"])
        try:
            self.ema.load_state_dict(state["ema"])
            set_moments(self.optimizer, state["optimizer"])
            self.means.load_state_dict(state["running_means"])
        except DAMAGE as error:
            raise UserError(f"the checkpoint does not fit the settings of the run: {error}") from error
        self.step, self.seconds = state["step"], state["seconds"]
