"""Several adapters on one base at once, each with a weight of its own."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from improved_diffusion.errors import UserError
from improved_diffusion.files import file_sha256
from improved_diffusion.personalize.config import PersonalizeConfig
from improved_diffusion.personalize.models.adapters import adapted_parts, choose_adapters, set_scales
from improved_diffusion.personalize.models.base import Base
from improved_diffusion.personalize.models.tuned import attach_run, load_adapter
from improved_diffusion.run_directory import RunDirectory, is_run_directory


@dataclass(frozen=True)
class Stacked:
    """One of several adapters."""

    source: Path  # a file, or the directory of a LoRA run
    weight: float

    @classmethod
    def parse(cls, text: str) -> Stacked:
        """From `SOURCE` or `SOURCE:WEIGHT`. Raises UserError for a weight that is no number."""
        source, colon, weight = text.rpartition(":")
        if not colon or Path(text).exists():
            return cls(Path(text), 1.0)
        try:
            number = float(weight)
        except ValueError:
            number = math.nan
        if not math.isfinite(number):
            raise UserError(f"the weight of the adapter {source} must be a number, not {weight!r}")
        return cls(Path(source), number)

    @property
    def run(self) -> RunDirectory | None:
        return RunDirectory(self.source) if is_run_directory(self.source) else None

    def fingerprint(self) -> str:
        """Of what is no weight and yet changes pictures: an alpha, for one."""
        return file_sha256(self.source if self.run is None else self.run.config_file)


def attach_stack(base: Base, stack: Sequence[Stacked], allow_unknown: bool = False) -> PersonalizeConfig:
    """Give `base` all adapters of the `stack`, in place; one of weight 0 is as good as not there.

    Returns:
        The settings of the first run among them; the defaults where there is none.

    Raises:
        UserError: see `attach_run`, `load_adapter` and `set_scales`; or more than one DoRA.
    """
    config = None
    names = [f"adapter_{number}" for number in range(len(stack))]
    for name, adapter in zip(names, stack, strict=True):
        if adapter.run is None:
            taken, layers = load_adapter(base, adapter.source, allow_unknown, name)
            print(f"{adapter.source}: {taken} of {layers} layers taken, weight {adapter.weight:g}", flush=True)
            continue
        try:
            settings, _ = attach_run(base, adapter.run, name)
        except UserError as error:
            raise UserError(f"the adapter {adapter.source} does not fit {base.name}: {error}") from error
        config = config or settings
    weights = {name: adapter.weight for name, adapter in zip(names, stack, strict=True) if adapter.weight}
    # PEFT lets a DoRA scale what the adapters before it gave, too: it goes first.
    in_order = sorted(weights, key=lambda name: not _is_dora(base, name))
    if sum(_is_dora(base, name) for name in weights) > 1:
        raise UserError("of several adapters only one may be a DoRA: a second would scale what the first one changes")
    choose_adapters(base, *in_order)
    for name in in_order:
        set_scales(base, weights[name], weights[name], name=name)
    return config or PersonalizeConfig()


def _is_dora(base: Base, name: str) -> bool:
    return any(name in part.peft_config and part.peft_config[name].use_dora for part in adapted_parts(base).values())
