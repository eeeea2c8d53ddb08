"""What is trained of a base: kept, put back, and never taken for that of another."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from improved_diffusion.errors import UserError

pytest.importorskip("diffusers")
from improved_diffusion.personalize.config import AdapterConfig, PersonalizeConfig  # noqa: E402
from improved_diffusion.personalize.generate import Sampling, draw  # noqa: E402
from improved_diffusion.personalize.models.base import Base  # noqa: E402
from improved_diffusion.personalize.models.trained import prepare  # noqa: E402

LORA = PersonalizeConfig(train_text_encoder=True, adapter=AdapterConfig(rank=3, alpha=5.0))


def picture(base: Base) -> bytes:
    return next(draw(base, ["a photo of a dog"], [0], Sampling(steps=2))).tobytes()


def disturbed(base: Base, config: PersonalizeConfig) -> dict[str, torch.Tensor]:
    """The state of what is trained, as training would leave it."""
    trained = prepare(base, config)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in trained.parameters.values():
            parameter += 0.3 * torch.randn(parameter.shape, generator=generator)
    return trained.state_dict()


def test_states_come_back_and_those_of_others_are_refused(base, fresh_base):
    state = disturbed(base, LORA)
    other = fresh_base(Path(base.name).name)
    prepare(other, LORA).load_state_dict(state)
    assert picture(other) == picture(base)
    with pytest.raises(UserError, match="another base or rank"):
        prepare(fresh_base(Path(base.name).name), replace(LORA, adapter=AdapterConfig(rank=4))).load_state_dict(state)
    with pytest.raises(UserError, match="another base or method"):
        prepare(fresh_base(Path(base.name).name), replace(LORA, method="full")).load_state_dict(state)
    another_kind = fresh_base("sd" if base.is_sdxl else "sdxl")
    with pytest.raises(UserError, match="another base or"):
        prepare(another_kind, LORA).load_state_dict(state)
