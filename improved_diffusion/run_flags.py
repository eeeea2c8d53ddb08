"""Which settings the flags of a run are about."""

from __future__ import annotations

import argparse
from pathlib import Path

from improved_diffusion.config import Config, run_type
from improved_diffusion.settings import read_settings


def run_type_of_flags(arguments: list[str]) -> type[Config]:
    """The dataclass of the settings that flags of train.py are about: of the kind of network that --model.kind, or
    else the file of settings, names.

    Raises:
        UserError: there is no such kind.
    """
    finder = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    finder.add_argument("--config", type=Path)
    finder.add_argument("--resume", type=Path)
    finder.add_argument("--model.kind", dest="kind")
    named, _ = finder.parse_known_args(arguments)
    file = named.config
    if named.resume is not None:
        run = named.resume.parent.parent if named.resume.suffix == ".pt" else named.resume
        file = run / "config.yaml"
    return run_type(read_settings(file) if file is not None and file.is_file() else {}, named.kind)
