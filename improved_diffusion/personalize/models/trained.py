"""What a run trains of its base: adapters, all weights, or the embeddings of a new word."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from improved_diffusion.errors import UserError
from improved_diffusion.personalize.config import PersonalizeConfig
from improved_diffusion.personalize.models.adapters import attach_adapters
from improved_diffusion.personalize.models.base import Base
from improved_diffusion.personalize.models.tokens import require_new_word, require_single_token
from improved_diffusion.personalize.models.words import add_word


@dataclass(frozen=True, eq=False)
class Trained:
    """{component name: {parameter name: parameter}} of what is trained; all of it is float32."""

    parts: dict[str, dict[str, nn.Parameter]]

    @property
    def parameters(self) -> dict[str, nn.Parameter]:
        """{component/parameter name: parameter}."""
        return {f"{part}/{name}": p for part, named in self.parts.items() for name, p in named.items()}

    @property
    def count(self) -> int:
        """How many numbers are trained."""
        return sum(parameter.numel() for parameter in self.parameters.values())

    def state_dict(self) -> dict[str, Tensor]:
        """{component/parameter name: value}; not copies."""
        return {name: parameter.detach() for name, parameter in self.parameters.items()}

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Copy in what `state_dict` gave.

        Raises:
            UserError: it is that of another architecture, rank or method.
        """
        own = self.parameters
        if strange := sorted(set(own) ^ set(state)):
            raise UserError(f"the weights are of another base or method: {strange[0]} is only on one side")
        for name, parameter in own.items():
            if parameter.shape != state[name].shape:
                raise UserError(
                    f"the weights are of another base or rank: {name} is {tuple(state[name].shape)} "
                    f"and should be {tuple(parameter.shape)}"
                )
            parameter.copy_(state[name])


def resolution_of(config: PersonalizeConfig, base: Base) -> int:
    """Pixels a side at which a run trains and draws."""
    return config.images.resolution or base.resolution


def require_token(config: PersonalizeConfig, tokenizers: Sequence[Any]) -> None:
    """Raise UserError where a subject's token will not do: one that a tokenizer splits, or, for textual inversion,
    knows already."""
    for subject in (part.subject for part in config.parts if part.subject.token is not None):
        if config.method == "textual_inversion":
            require_new_word(subject.token, tokenizers)
        elif not subject.allow_split_token:
            require_single_token(subject.token, tokenizers)


def needed_for_updates(base: Base, config: PersonalizeConfig) -> list[str]:
    """The components that an update works with. The others may wait on the CPU: the encoders of texts that are kept,
    and the autoencoder of latents that are."""
    of_texts = [] if config.keeps_texts else list(base.text_encoders)
    return ["unet", *of_texts, *([] if config.images.cache else ["vae"])]


def prepare(base: Base, config: PersonalizeConfig) -> Trained:
    """Make trainable what `config` says, in place, and freeze the rest.

    Raises:
        UserError: see `require_token`.
    """
    text_encoders = base.text_encoders if config.train_text_encoder else {}
    require_token(config, base.tokenizers)
    if config.method == "lora":
        attach_adapters(base, config.adapter, text_encoders=config.train_text_encoder, seed=config.seed)
    else:
        for part in (base.unet, *base.text_encoders.values(), base.pipeline.vae):
            part.requires_grad_(False)
    if config.method == "full":
        for part in (base.unet, *text_encoders.values()):
            part.float().requires_grad_(True)
    if config.method == "textual_inversion":
        add_word(base, config.subject.token, config.subject.class_name, config.subject.vectors)
    return trained_parts(base)


def trained_parts(base: Base) -> Trained:
    """What of a base is trainable."""
    parts = {"unet": base.unet, **base.text_encoders}
    named = {
        name: {key: parameter for key, parameter in part.named_parameters() if parameter.requires_grad}
        for name, part in parts.items()
    }
    return Trained({name: parameters for name, parameters in named.items() if parameters})
