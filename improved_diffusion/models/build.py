"""From settings to a network, and from a network to the denoiser that losses and samplers take."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn

from improved_diffusion.config import Config, DiffusionConfig, SamplingConfig
from improved_diffusion.diffusion.denoiser import Denoiser, Network, NetworkDenoiser
from improved_diffusion.diffusion.guidance import EVERYWHERE, AutoGuidance, ClassifierFreeGuidance
from improved_diffusion.diffusion.process import PROCESSES, Process, VarianceExploding
from improved_diffusion.diffusion.schedule import SCHEDULES, NoiseSchedule, sampling_schedule
from improved_diffusion.errors import UserError
from improved_diffusion.models.backbone import Backbone
from improved_diffusion.models.transformer import Transformer
from improved_diffusion.models.unet import UNet

BACKBONES: dict[str, type[Backbone]] = {"unet": UNet, "transformer": Transformer}
NOT_OF_NETWORKS = ("kind", "channels", "class_conditional", "class_dropout")  # settings that they know otherwise
STEPS_IN_CONTINUOUS_TIME = 50  # of sampling, where the settings do not say


def build_network(config: Config, num_classes: int) -> Backbone:
    """The network of the settings, with newly drawn weights.

    Raises:
        UserError: settings that do not fit together.
    """
    model = config.model
    settings = {f.name: getattr(model, f.name) for f in dataclasses.fields(model) if f.name not in NOT_OF_NETWORKS}
    try:
        return BACKBONES[model.kind](
            **settings,
            in_channels=model.channels,
            out_channels=model.channels * (2 if config.diffusion.variance == "learned_range" else 1),
            num_classes=num_classes if model.class_conditional else None,
            null_class=model.class_dropout > 0,
            augmented=config.training.augment > 0,
        )
    except (ValueError, TypeError, ArithmeticError, RuntimeError, MemoryError) as error:  # PyTorch's, of absurd sizes
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(f"the settings under model do not fit together, or not into memory: {reason}") from error


def build_process(diffusion: DiffusionConfig) -> Process:
    """The forward process of the settings, in T steps or in continuous time."""
    if diffusion.timesteps is None:
        return PROCESSES[diffusion.schedule]()
    return SCHEDULES[diffusion.schedule](diffusion.timesteps).process


def build_levels(diffusion: DiffusionConfig, device: torch.device) -> NoiseSchedule | Process:
    """What gives the noise level of the t that training draws: T steps, or a process in continuous time."""
    if diffusion.timesteps is None:
        return build_process(diffusion)
    return SCHEDULES[diffusion.schedule](diffusion.timesteps).to(device)


def build_schedule(diffusion: DiffusionConfig, sampling: SamplingConfig) -> NoiseSchedule:
    """The noise levels that sampling visits.

    Raises:
        UserError: more sampling steps than timesteps.
    """
    process, steps = build_process(diffusion), number_of_steps(diffusion, sampling)
    try:
        return sampling_schedule(process, steps, sampling.chosen_spacing)
    except ValueError as error:
        raise UserError(
            f"{steps} sampling steps cannot be spread over the model's {process.timesteps} timesteps: {error}"
        ) from error


def number_of_steps(diffusion: DiffusionConfig, sampling: SamplingConfig) -> int:
    """How many steps sampling takes."""
    return sampling.steps or diffusion.timesteps or STEPS_IN_CONTINUOUS_TIME


def build_denoiser(config: Config, network: Network) -> NetworkDenoiser:
    """`network` as a denoiser."""
    diffusion = config.diffusion
    assert diffusion.variance is not None  # Config fills it in
    scale_input = diffusion.prediction == "edm" or PROCESSES[diffusion.schedule] is VarianceExploding
    return NetworkDenoiser(
        network, diffusion.prediction, diffusion.variance, diffusion.timestep_range, scale_input=scale_input
    )


def build_sampling_denoiser(
    config: Config, sampling: SamplingConfig, network: Network, num_classes: int, guide: Denoiser | None = None
) -> Denoiser:
    """`network` as a denoiser, guided where the settings ask for it: by `guide`, or by itself without the class.

    Raises:
        UserError: guidance without a guide of a model that was trained without class dropout.
    """
    denoiser = build_denoiser(config, network)
    if sampling.guidance_scale == 1:
        return denoiser
    interval = sampling.guidance_interval or EVERYWHERE
    if guide is not None:
        return AutoGuidance(denoiser, guide, sampling.guidance_scale, interval)
    if config.model.class_dropout == 0:
        raise UserError("this model cannot be guided: it was trained with model.class_dropout 0; use guidance scale 1")
    return ClassifierFreeGuidance(denoiser, sampling.guidance_scale, num_classes, interval)


def set_weights(network: nn.Module, weights: dict) -> None:
    """Load `weights` into `network`.

    Raises:
        UserError: they are those of another architecture; the message names a tensor that differs.
    """
    own = {name: tuple(tensor.shape) for name, tensor in network.state_dict().items()}
    given = {name: tuple(tensor.shape) for name, tensor in weights.items()}
    for name in sorted(own.keys() | given.keys()):
        if own.get(name) != given.get(name):
            raise UserError(
                "the checkpoint is of another architecture than the settings under model: "
                f"{name} is {given.get(name, 'absent')} in the checkpoint and {own.get(name, 'absent')} in the settings"
            )
    network.load_state_dict(weights)


def set_moments(optimizer: torch.optim.Optimizer, state: dict) -> None:
    """Give an AdamW or Muon the moments in `state`, from its `state_dict`. The groups in it are settings, which a
    resumed run has already.

    Raises ValueError where they are those of other parameters.
    """
    shapes = [tuple(parameter.shape) for group in optimizer.param_groups for parameter in group["params"]]
    if state["state"].keys() - set(range(len(shapes))):
        raise ValueError("the saved moments are of more parameters")
    for index, moments in state["state"].items():
        found = {name: tuple(moment.shape) for name, moment in moments.items() if moment.is_floating_point()}
        if found not in (
            {"step": (), "exp_avg": shapes[index], "exp_avg_sq": shapes[index]},
            {"momentum_buffer": shapes[index]},
        ):
            raise ValueError(f"the saved moments of parameter {index} are of another shape or kind")
    groups = torch.optim.Optimizer.state_dict(optimizer)["param_groups"]  # one that is divided has another state_dict
    optimizer.load_state_dict({"state": dict(state["state"]), "param_groups": groups})


@contextlib.contextmanager
def swapped_weights(parameters: Mapping[str, nn.Parameter], weights: Mapping[str, Tensor]) -> Iterator[None]:
    """Let `parameters`, {name: parameter}, have the `weights` of these names inside the block, and their own after."""
    own = {name: parameter.detach().clone() for name, parameter in parameters.items()}

    @torch.no_grad()
    def load(values: Mapping[str, Tensor]) -> None:
        for name, parameter in parameters.items():
            parameter.copy_(values[name])

    load(weights)
    try:
        yield
    finally:
        load(own)
