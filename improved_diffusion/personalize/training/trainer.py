"""One update, and everything that it changes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from improved_diffusion.checkpoint_file import DAMAGE
from improved_diffusion.diffusion.noise import seeded_generator
from improved_diffusion.errors import UserError
from improved_diffusion.models.ema import EMA
from improved_diffusion.personalize.config import PersonalizeConfig
from improved_diffusion.personalize.data.captions import vary
from improved_diffusion.personalize.data.examples import Conditions, Examples, Latents
from improved_diffusion.personalize.data.stream import PriorStream, stream_of
from improved_diffusion.personalize.models.base import Base
from improved_diffusion.personalize.models.trained import Trained
from improved_diffusion.personalize.training.budget import Counters, plan
from improved_diffusion.personalize.training.losses import (
    add_noise,
    dreambooth_loss,
    min_snr_weights,
    offset_noise,
    per_sample_loss,
    target,
)
from improved_diffusion.personalize.training.optimizers import (
    FusedBackward,
    make_optimizer,
    restore,
    set_rates,
)
from improved_diffusion.personalize.training.running_means import RunningMeans

# Generators of a run are keyed (seed, purpose, micro-batch): resuming draws what an unbroken run would have drawn.
DRAWS, DROPOUT, CAPTIONS = range(100, 103)


@dataclass(frozen=True, eq=False)
class EncodedSet:
    """Encoded images, with the texts that each is learned with."""

    examples: Examples
    wordings: Sequence[Sequence[str]]
    concepts: Sequence[int] = ()  # to which of the run's concepts each belongs; by default to the first

    def __post_init__(self) -> None:
        object.__setattr__(self, "concepts", tuple(self.concepts) or (0,) * len(self.wordings))


class Trainer:
    """A base in training. `step` counts the updates.

    Each process takes micro-batches of its own; gradients are averaged over all of an update. What a micro-batch draws
    is a function of (seed, its number).

    Args:
        base: on the accelerator's device, in its dtypes.
        trained: which of its parameters learn.
        config: of the run.
        source: what is learned.
        priors: {concept: what is kept beside it, of one size for each size of its images: {(height, width): images}},
            of the concepts that have one.
        accelerator: device, precision and processes.
        conditions: what encodes texts; by default one of the base's own.
    """

    def __init__(
        self,
        base: Base,
        trained: Trained,
        config: PersonalizeConfig,
        source: EncodedSet,
        priors: Mapping[int, Mapping[tuple[int, int], EncodedSet]],
        accelerator: Accelerator,
        conditions: Conditions | None = None,
    ):
        training = config.training
        self.base, self.trained, self.config, self.accelerator = base, trained, config, accelerator
        self.source, self.priors = source, priors
        self.stream = stream_of(source.examples.sizes, source.concepts, config)
        self.prior_streams = {c: PriorStream(config.parts[c].prior.images, config.seed) for c in priors}
        # Indices of the images beside which those of a prior are seen.
        self.beside = {c: frozenset(i for i, own in enumerate(source.concepts) if own == c) for c in priors}
        self.with_prior = frozenset().union(*self.beside.values())
        self.conditions = conditions or Conditions(base, config.keeps_texts)
        self.alphas_cumprod = base.alphas_cumprod.to(accelerator.device)
        self.updates = plan(self.stream, training, accelerator.num_processes, self.with_prior).total.updates
        optimizer = make_optimizer({part: list(named.values()) for part, named in trained.parts.items()}, config)
        self.optimizer = accelerator.prepare_optimizer(optimizer, device_placement=True)
        self.fused = FusedBackward(optimizer, self._share_gradients) if training.fused_backward else None
        self.ema = EMA(trained.parameters, (training.ema_rate,)) if training.ema_rate is not None else None
        if training.gradient_checkpointing:
            base.unet.enable_gradient_checkpointing()
            for name in trained.parts.keys() - {"unet"}:
                base.text_encoders[name].gradient_checkpointing_enable()
        self.means = RunningMeans(accelerator.device)
        # Known once, for to ask for them takes a walk over all modules.
        self._dtype, self._parameters = base.unet.dtype, list(trained.parameters.values())
        self._is_training = False
        self.step = self.images_seen = self.prior_seen = 0

    @property
    def counters(self) -> Counters:
        """What has been done so far, by all processes."""
        return Counters(self.step, self.images_seen, self.prior_seen)

    def train_step(self) -> dict[str, Tensor]:
        """One update. Returns what is logged of it, averaged over its micro-batches and the processes; not finite where
        the update was not, see `is_sound`."""
        training, accelerator = self.config.training, self.accelerator
        set_rates(self.optimizer, training, self.step, self.updates)
        self._set_training(True)
        means: dict[str, Tensor] = {}
        for part in range(training.accumulation):
            first = (self.step * training.accumulation + part) * accelerator.num_processes
            terms = self._losses(first + accelerator.process_index)
            accelerator.backward(terms["loss"] / training.accumulation)
            for name, value in terms.items():
                means[name] = means.get(name, 0) + value.detach() / training.accumulation
            for number in range(first, first + accelerator.num_processes):
                self._count(self.stream.micro_batch(number))
        means["grad_norm"] = self._update() if self.fused is None else self.fused.gradient_norm()
        if self.ema is not None:
            self.ema.update(self.step)
        self.optimizer.zero_grad()  # now, for a look takes memory too
        self.step += 1
        means = accelerator.reduce(means, "mean")
        self.means.add(means)
        return means

    def _update(self) -> Tensor:
        """Change the parameters by their gradients. Returns the norm of these."""
        self._share_gradients(self._parameters)
        limit = float("inf") if self.config.training.grad_clip is None else self.config.training.grad_clip
        norm = self.accelerator.clip_grad_norm_(self._parameters, limit)
        self.optimizer.step()
        return norm

    def is_sound(self) -> bool:
        """Whether loss and gradient of all updates since the last `means.flush` were finite; waits for the device.

        To be asked before anything of them is kept: an update that is not sound leaves broken weights. In fp16 the
        gradient may overflow: then the scaler leaves the update out, and lowers its scale."""
        names = ("loss",) if self.accelerator.scaler is not None else ("loss", "grad_norm")
        return self.means.are_finite(names)

    def rest(self) -> None:
        """Until the next update the networks drop nothing out: before they draw or are measured."""
        self._set_training(False)

    def _set_training(self, mode: bool) -> None:
        """The trained parts stay in their mode from update to update: to set it takes a walk over all modules."""
        if mode != self._is_training:
            for part in self.trained.parts:
                getattr(self.base.pipeline, part).train(mode)
            self._is_training = mode

    def _count(self, indices: list[int]) -> None:
        self.images_seen += len(indices)
        self.prior_seen += sum(index in self.with_prior for index in indices)

    def _share_gradients(self, parameters: list[torch.nn.Parameter]) -> None:
        """Average over the processes, once an update: simpler than a wrapper about each part, and no slower for what
        little is trained as a rule."""
        if self.accelerator.num_processes > 1:
            for parameter in parameters:
                if parameter.grad is not None:  # the last layer of SDXL's first text encoder is never used
                    parameter.grad = self.accelerator.reduce(parameter.grad, "mean")

    def _losses(self, number: int) -> dict[str, Tensor]:
        """The loss of micro-batch `number` and its parts, scalars."""
        config, device = self.config, self.accelerator.device
        generator = seeded_generator(config.seed, DRAWS, number)
        indices = self.stream.micro_batch(number)
        of_texts = seeded_generator(config.seed, CAPTIONS, number)
        latents, texts = self._draw(self.source, indices, generator, of_texts)
        draws = [(latents, vary(texts, config.images, of_texts))]
        for concept, prior in self.priors.items():
            if count := sum(index in self.beside[concept] for index in indices):
                before = self.stream.images_in(number, self.beside[concept])
                of_prior = self.prior_streams[concept].images(before, count)
                size = self.source.examples.sizes[indices[0]]
                draws.append(self._draw(prior[size], of_prior, generator, of_texts))
        latents = Latents(*(torch.cat(tensors) for tensors in zip(*(latents for latents, _ in draws), strict=True)))
        texts = [text for _, of_source in draws for text in of_source]
        x_0 = latents.mean + latents.std * torch.randn(latents.mean.shape, generator=generator)
        noise = torch.randn(x_0.shape, generator=generator)
        if config.training.noise_offset:
            noise = offset_noise(noise, config.training.noise_offset, generator)
        t = torch.randint(len(self.alphas_cumprod), (len(x_0),), generator=generator).to(device)
        if config.adapter.dropout:
            torch.manual_seed(seeded_generator(config.seed, DROPOUT, number).initial_seed())
        losses = self.denoising_losses(x_0.to(device), noise.to(device), t, texts, latents.size_ids, latents.mask)
        weights = None
        if config.training.min_snr_gamma is not None:
            gamma = config.training.min_snr_gamma
            weights = min_snr_weights(t, self.alphas_cumprod, gamma, self.base.prediction)
        own, of_prior = losses[: len(indices)], losses[len(indices) :]
        terms = {"loss": dreambooth_loss(losses, weights, len(indices), config.prior.weight), "mse": own.mean()}
        if self.priors:  # 0 where the images of this micro-batch have none
            terms["mse_prior"] = of_prior.mean() if len(of_prior) else losses.new_zeros(())
        return terms

    @staticmethod
    def _draw(
        source: EncodedSet, indices: list[int], generator: torch.Generator, of_texts: torch.Generator
    ) -> tuple[Latents, list[str]]:
        """The images `indices` in crops drawn at random, each with one of its texts."""
        count = len(source.examples.variants)
        variant = torch.randint(count, (len(indices),), generator=generator).tolist()
        wordings = [source.wordings[i] for i in indices]
        texts = [of_one[torch.randint(len(of_one), (), generator=of_texts)] for of_one in wordings]
        return source.examples(indices, variant), texts

    def denoising_losses(
        self, x_0: Tensor, noise: Tensor, t: Tensor, texts: Sequence[str], size_ids: Tensor, mask: Tensor
    ) -> Tensor:
        """(N,): the mean-square error of each of N latents (N, 4, h, w), noised to t (N,), under its text.

        size_ids: (N, 6), which SDXL alone is told. mask: (N, 1, h, w), which runs with masks alone look at."""
        x_t = add_noise(x_0, noise, t, self.alphas_cumprod)
        with self.accelerator.autocast():
            conditions = {name: tensor.to(x_0.device) for name, tensor in self.conditions(texts).items()}
            added = None
            if self.base.is_sdxl:
                added = {"text_embeds": conditions["pooled"], "time_ids": size_ids.to(x_0.device)}
            predicted = self.base.unet(
                x_t.to(self._dtype),
                t,
                encoder_hidden_states=conditions["states"].to(self._dtype),
                added_cond_kwargs=added,
            ).sample
        expected = target(x_0, noise, t, self.alphas_cumprod, self.base.prediction)
        return per_sample_loss(predicted, expected, mask.to(x_0.device) if self.config.images.has_masks else None)

    def state_dict(self) -> dict[str, Any]:
        """All that a resumed run needs: tensors and plain values."""
        scaler = self.accelerator.scaler
        return {
            "step": self.step,
            "images_seen": self.images_seen,
            "prior_seen": self.prior_seen,
            "model": self.trained.state_dict(),
            "ema": self.ema.state_dict() if self.ema else None,
            "optimizer": self.optimizer.state_dict(),
            "scaler": scaler.state_dict() if scaler else None,
            "running_means": self.means.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from `state`.

        Raises:
            UserError: it is that of another architecture, or of other settings.
        """
        self.trained.load_state_dict(state["model"])
        try:
            if self.ema is not None:
                self.ema.load_state_dict(state["ema"])
            restore(self.optimizer.optimizer, self.config.training.optimizer, state["optimizer"])
            if self.accelerator.scaler is not None:
                self.accelerator.scaler.load_state_dict(state["scaler"])
            if "running_means" in state:  # older checkpoints have none
                self.means.load_state_dict(state["running_means"])
        except DAMAGE as error:
            raise UserError(f"the checkpoint does not fit the settings of the run: {error}") from error
        self.step, self.images_seen, self.prior_seen = (state[n] for n in ("step", "images_seen", "prior_seen"))
