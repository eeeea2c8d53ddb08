"""The settings of a run in a file, whose kind of network decides which they are."""

from __future__ import annotations

import functools
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from improved_diffusion.config import Config, TransformerConfig
from improved_diffusion.settings import plain_settings, require, settings_of, settings_text


@dataclass(frozen=True)
class TransformerRun(Config):
    """A run of a transformer."""

    # The parser wants one class here, not a union; what is read of `model` elsewhere is what both kinds have.
    model: TransformerConfig = field(default_factory=TransformerConfig)  # type: ignore[assignment]


RUNS: dict[str, type[Config]] = {"unet": Config, "transformer": TransformerRun}


def run_type(settings: dict[str, Any], kind: str | None = None) -> type[Config]:
    """The dataclass of `settings`, of which `kind`, or else their model.kind, or else unet, is the kind of network.

    Raises:
        UserError: there is no such kind.
    """
    model = settings.get("model")
    kind = kind or (model.get("kind", "unet") if isinstance(model, dict) else "unet")
    require(kind in RUNS, f"model.kind must be one of {', '.join(RUNS)}, not {kind}")
    return RUNS[kind]


def load_config(path: Path | str) -> Config:
    """The configuration in a YAML file. Raises UserError as `load_settings` does."""
    return _config_of(settings_text(path), str(path))


@functools.lru_cache(maxsize=8)
def _config_of(text: str, source: str) -> Config:
    """A command wants the settings of its run at several places, and to parse them takes a twentieth of a second."""
    plain = plain_settings(text, source)
    return settings_of(run_type(plain), plain, source)
