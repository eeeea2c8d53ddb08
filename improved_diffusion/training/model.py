"""From settings to a network, and from a network to the denoiser that losses and samplers take."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn

from improved_diffusion.config import Config, SamplingConfig
from improved_diffusion.diffusion.denoiser import Denoiser, DiscreteDenoiser, Network
from improved_diffusion.diffusion.guidance import ClassifierFreeGuidance
from improved_diffusion.diffusion.schedule import SCHEDULES, evenly_spaced, respace
from improved_diffusion.errors import UserError
from improved_diffusion.models.unet import UNet


def build_network(config: Config, num_classes: int) -> UNet:
    """The UNet of the settings, with newly drawn weights.

    Raises:
        UserError: settings that do not fit together.
    """
    model = config.model
    try:
        return UNet(
            image_size=model.image_size,
            num_channels=model.num_channels,
            channel_multipliers=model.channel_multipliers,
            num_res_blocks=model.num_res_blocks,
            attention_resolutions=model.attention_resolutions,
            num_heads=model.num_heads,
            dropout=model.dropout,
            num_classes=num_classes if model.class_conditional else None,
            null_class=model.class_dropout > 0,
            out_channels=6 if config.diffusion.variance == "learned_range" else 3,
        )
    except (ValueError, TypeError, ArithmeticError, RuntimeError, MemoryError) as error:  # PyTorch's, of absurd sizes
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(f"the settings under model do not fit together, or not into memory: {reason}") from error


def build_denoiser(config: Config, network: Network, device: torch.device) -> DiscreteDenoiser:
    """`network` as a denoiser over all the timesteps it is trained on."""
    diffusion = config.diffusion
    schedule = SCHEDULES[diffusion.schedule](diffusion.timesteps).to(device)
    return DiscreteDenoiser(network, schedule, diffusion.prediction, diffusion.variance, diffusion.timestep_range)


def build_sampling_denoiser(
    config: Config, sampling: SamplingConfig, network: Network, num_classes: int, device: torch.device
) -> Denoiser:
    """`network` as a denoiser over the sampling steps, guided where the settings ask for it.

    Raises:
        UserError: more sampling steps than timesteps, or guidance of a model that was trained without class dropout.
    """
    denoiser = build_denoiser(config, network, device)
    length = len(denoiser.schedule)
    if sampling.steps is not None:
        if sampling.steps > length:
            raise UserError(f"{sampling.steps} sampling steps are more than the model's {length} timesteps")
        denoiser.schedule = respace(denoiser.schedule, evenly_spaced(length, sampling.steps))
    if sampling.guidance_scale == 1:
        return denoiser
    if config.model.class_dropout == 0:
        raise UserError("this model cannot be guided: it was trained with model.class_dropout 0; use guidance scale 1")
    return ClassifierFreeGuidance(denoiser, sampling.guidance_scale, null_class=num_classes)


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
    """Give an AdamW the moments in `state`, from its `state_dict`. The groups in it are settings, which a resumed run
    has already.

    Raises ValueError where they are those of other parameters.
    """
    shapes = [tuple(parameter.shape) for group in optimizer.param_groups for parameter in group["params"]]
    for index, moments in state["state"].items():
        found = {name: tuple(moment.shape) for name, moment in moments.items() if moment.is_floating_point()}
        if found != {"step": (), "exp_avg": shapes[index], "exp_avg_sq": shapes[index]}:
            raise ValueError(f"the saved moments of parameter {index} are of another shape or kind")
    optimizer.load_state_dict({"state": state["state"], "param_groups": optimizer.state_dict()["param_groups"]})


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
