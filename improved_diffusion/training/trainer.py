"""One training step, and everything that it changes."""

from __future__ import annotations

import contextlib
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from improved_diffusion.checkpoint_file import DAMAGE
from improved_diffusion.config import Config
from improved_diffusion.data.augmentation import augment, draw_parameters
from improved_diffusion.data.batches import BatchStream
from improved_diffusion.data.image_set import ImageSet
from improved_diffusion.diffusion.levels import make_level_sampler
from improved_diffusion.diffusion.noise import seeded_generator
from improved_diffusion.diffusion.objective import named_objective
from improved_diffusion.errors import UserError
from improved_diffusion.models.build import (
    build_denoiser,
    build_levels,
    build_network,
    build_process,
    set_moments,
    set_weights,
)
from improved_diffusion.models.ema import EMA
from improved_diffusion.models.power_ema import PowerFunctionEMA
from improved_diffusion.runtime.devices import Processes, arithmetic, upload, with_autocast
from improved_diffusion.training.cuda_graph import CapturedFunction, obstacle_to_capture
from improved_diffusion.training.optimization import learning_rate, make_optimizers
from improved_diffusion.training.running_terms import RunningTerms

# Generators of a run are keyed (seed, purpose, step): resuming draws what an unbroken run would have drawn.
TIMESTEPS, NOISE, CLASS_DROPOUT, DROPOUT, AUGMENTATION = range(5)


class Trainer:
    """A model in training. `step` counts the optimizer steps taken.

    What a step draws (images, flips, timesteps, noise, dropped classes) is a function of (seed, step), drawn for the
    whole batch and then divided among the processes and their accumulated parts; only the network's dropout also
    depends on how many parts there are, in all processes together.

    Raises:
        UserError: settings that fit neither each other, nor the images, nor the number of processes.
    """

    def __init__(self, config: Config, image_set: ImageSet, processes: Processes):
        training, device = config.training, processes.device
        height, width, channels = image_set.images.shape[1:]
        if (channels, height, width) != config.model.image_shape:
            size = height if height == width else f"'[{height}, {width}]'"
            raise UserError(
                f"the images of {image_set.path} have {height}x{width} pixels and {channels} channels, and the "
                f"settings model.image_size {config.model.image_size} and model.channels {config.model.channels}: take "
                f"--model.image_size {size} --model.channels {channels}, or pack the images as the settings are"
            )
        if training.batch_size % (processes.world_size * training.accumulation):
            raise UserError(
                f"training.batch_size {training.batch_size} cannot be divided among {processes.world_size} processes "
                f"with training.accumulation {training.accumulation} each"
            )
        self.config = config
        self.processes = processes
        self.step = 0
        self.num_classes = len(image_set.class_names)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(config.seed)
            self.network = build_network(config, self.num_classes)
        self.network.to(device, memory_format=torch.channels_last)
        parameters = dict(self.network.named_parameters())
        self.ema = EMA(parameters, training.ema_rates)
        self.power_ema = PowerFunctionEMA(parameters, training.ema_lengths)
        self.optimizers = make_optimizers(training, self.network)
        diffusion = config.diffusion
        self.levels = build_levels(diffusion, device)
        self.timestep_sampler = make_level_sampler(diffusion.timestep_sampler, build_process(diffusion), device)
        self.objective = named_objective(
            config.loss,
            timesteps=diffusion.timesteps,
            vlb_weight=diffusion.vlb_weight,
            loss_space=diffusion.loss_space,
            weighting=diffusion.weighting,
        )
        self.stream = BatchStream(
            image_set,
            training.batch_size,
            config.seed,
            flip=training.flip,
            device=device,
            rank=processes.rank,
            world_size=processes.world_size,
        )
        self.parallel: nn.Module = self.network
        if processes.world_size > 1:
            self.parallel = DistributedDataParallel(torch.compile(self.network) if training.compile else self.network)
        self.dtype = arithmetic(training.precision, device)
        self.denoiser = build_denoiser(config, with_autocast(self.parallel, device, self.dtype))
        self.terms = RunningTerms(device)
        self._run_loss = self.loss
        if training.compile and processes.world_size == 1:
            self._run_loss = torch.compile(self.loss, dynamic=False)
        self.captured = training.cuda_graph and obstacle_to_capture(processes) is None
        self._run_backward = CapturedFunction(self._backward) if self.captured else self._backward

    def train_step(self, x_start: Tensor, y: Tensor) -> None:
        """One optimizer step on this process's share of the batch that the stream holds for `step`.

        Args:
            x_start: (batch_size / world_size, 3, H, W) on [-1, 1].
            y: int64 (batch_size / world_size,).
        """
        training = self.config.training
        t, weights, noise, y = self._draw(y)
        x_start, augmentation = self._augment(x_start)
        lr = learning_rate(training, self.step)
        self.network.zero_grad(set_to_none=not self.captured)
        self.network.train()
        bounds = []
        drawn = (x_start, t, y, noise, weights, *augmentation)
        parts = zip(*(tensor.chunk(training.accumulation) for tensor in drawn), strict=True)
        for part, tensors in enumerate(parts):
            if self.config.model.dropout > 0:
                torch.manual_seed(self._dropout_seed(part))
            with self._gradients_shared_only_if(part == training.accumulation - 1):
                bounds.append(self._run_backward(*tensors))
        self.terms.add_grad_norm(self._clip_gradients())
        for optimizer in self.optimizers.values():
            for group in optimizer.param_groups:
                group["lr"] = lr
            optimizer.step()
        self.ema.update(self.step)
        self.power_ema.update(self.step)
        if self.timestep_sampler.learns:
            gather = self.processes.concatenate
            self.timestep_sampler.update(gather(t), gather(torch.cat(bounds)))
        self.step += 1

    def _backward(self, *tensors: Tensor) -> Tensor | None:
        """Add the gradients of a part of the batch. Returns the bound's terms of its images, if the loss has them."""
        loss, vlb = self._run_loss(*tensors)
        loss.backward()
        return vlb

    def loss(
        self, x_start: Tensor, t: Tensor, y: Tensor, noise: Tensor, weights: Tensor, *augmentation: Tensor
    ) -> tuple[Tensor, Tensor | None]:
        """The loss of a part of the batch, which is counted in the running terms; and the bound's terms."""
        level = self.levels.at(t)
        classes = y if self.config.model.class_conditional else None
        denoiser = self.denoiser.told(augmentation=augmentation[0]) if augmentation else self.denoiser
        terms = self.objective(denoiser, x_start, level, classes, noise)
        self.terms.add(terms, level, weights)
        loss = (terms.loss * weights).mean() / self.config.training.accumulation
        return loss, None if terms.vlb is None else terms.vlb.detach()

    @property
    def execution(self) -> str:
        """How steps are run, in words."""
        training, alone = self.config.training, self.processes.world_size == 1
        compiled = "forward process, network and loss compiled" if alone else "network compiled"
        obstacle = obstacle_to_capture(self.processes)
        captured = f"not in a CUDA graph, for {obstacle}" if obstacle else "forward and backward pass in a CUDA graph"
        return "; ".join([compiled] * training.compile + [captured] * training.cuda_graph)

    def _draw(self, y: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """This process's timesteps, their importance weights, the noise, and the classes with some of them dropped."""
        config, device = self.config, self.processes.device
        n = config.training.batch_size
        share = slice(self.processes.rank * len(y), (self.processes.rank + 1) * len(y))
        t, weights = self.timestep_sampler.sample(n, seeded_generator(config.seed, TIMESTEPS, self.step))
        noise_generator = seeded_generator(config.seed, NOISE, self.step, device=device)
        noise = torch.randn(n, *config.model.image_shape, generator=noise_generator, device=device)[share]
        if config.model.class_dropout > 0:
            draws = torch.rand(n, generator=seeded_generator(config.seed, CLASS_DROPOUT, self.step))[share]
            y = torch.where(upload(draws < config.model.class_dropout, device), self.num_classes, y)
        return upload(t[share], device), upload(weights[share], device), noise, y

    def _augment(self, x_start: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        """This process's images, augmented if they are to be, and then also what was done to them."""
        probability, n = self.config.training.augment, len(x_start)
        if probability == 0:
            return x_start, ()
        generator = seeded_generator(self.config.seed, AUGMENTATION, self.step)
        whole = draw_parameters(self.config.training.batch_size, probability, generator)
        own = upload(whole[self.processes.rank * n : (self.processes.rank + 1) * n], self.processes.device)
        return augment(x_start, own).contiguous(memory_format=torch.channels_last), (own,)

    def _dropout_seed(self, part: int) -> int:
        """Seed of the network's dropout, which can only be drawn from the global generator, for a part of the batch."""
        number = self.processes.rank * self.config.training.accumulation + part  # among those of all processes
        # The 0 was the rank once: without it runs of one process would no longer draw what they did.
        return seeded_generator(self.config.seed, DROPOUT, self.step, 0, number).initial_seed()

    def _gradients_shared_only_if(self, last: bool) -> contextlib.AbstractContextManager:
        """Let the processes average their gradients only once, with the last part of the batch."""
        shares = isinstance(self.parallel, DistributedDataParallel) and not last
        return self.parallel.no_sync() if shares else contextlib.nullcontext()

    def _clip_gradients(self) -> Tensor:
        """Clip the gradient's norm, if it has a limit, and return what it was."""
        limit, parameters = self.config.training.grad_clip, list(self.network.parameters())
        if limit is None:
            return torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
        return torch.nn.utils.clip_grad_norm_(parameters, limit)

    def state_dict(self) -> dict[str, Any]:
        """All that a resumed run needs: tensors and plain values; to be called in all processes."""
        return {
            "step": self.step,
            "images_seen": self.step * self.config.training.batch_size,
            "model": self.network.state_dict(),
            "ema": self.ema.state_dict(),
            "power_ema": self.power_ema.state_dict(),
            **{name: optimizer.state_dict() for name, optimizer in self.optimizers.items()},
            "timestep_sampler": self.timestep_sampler.state_dict(),
            "running_terms": self.terms.state_dict(self.processes),
        }

    def averages_to_keep(self) -> dict[str, Any]:
        """The power-function averages, in half precision: what `models/power_ema.py` blends after training."""
        averages = self.power_ema.state_dict()
        half = {
            length: {name: tensor.half() for name, tensor in average.items()} for length, average in averages.items()
        }
        return {"step": self.step, "power_ema": half}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from `state`.

        Raises:
            UserError: it is that of another architecture, or of other settings.
        """
        set_weights(self.network, state["model"])
        try:
            self.ema.load_state_dict(state["ema"])
            self.power_ema.load_state_dict(state.get("power_ema", {}))  # older checkpoints have none
            for name, optimizer in self.optimizers.items():
                set_moments(optimizer, state[name])
            self.timestep_sampler.load_state_dict(state["timestep_sampler"])
            if "running_terms" in state:  # older checkpoints have none
                self.terms.load_state_dict(state["running_terms"], self.processes)
        except DAMAGE as error:
            raise UserError(f"the checkpoint does not fit the settings of the run: {error}") from error
        self.step = state["step"]
