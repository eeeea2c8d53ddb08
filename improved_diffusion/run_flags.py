"""The flags of a run: new or resumed, and which settings they are about."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import jsonargparse

from improved_diffusion.config import Config
from improved_diffusion.config_file import run_type
from improved_diffusion.settings import parse_arguments, read_settings, require, settings_parser


def run_parser(kind: type, config_help: str = "YAML file of settings", **kwargs: Any) -> jsonargparse.ArgumentParser:
    """A parser with a flag for every setting of the dataclass `kind`, and those that say which run it is."""
    parser = settings_parser(kind, **kwargs)
    parser.add_argument("--config", help=config_help)
    parser.add_argument("--out", help="directory of the run (default: a new one under runs/)")
    parser.add_argument("--resume", help="directory of a run to go on with, or one of its checkpoints")
    return parser


def parse_run(parser: jsonargparse.ArgumentParser, arguments: list[str]) -> jsonargparse.Namespace:
    """The flags in `arguments`; see `run_parser`.

    Raises:
        UserError: as `parse_arguments`; a resumed run is given settings or a directory; or a path is empty, as of a
            shell's variable that is not set.
    """
    options = parse_arguments(parser, arguments)
    for name in ("config", "out", "resume"):
        require(getattr(options, name) != "", f"--{name} is empty: name a path, or leave it out")
    require(
        options.resume is None or not (options.config or options.out),
        "--resume takes the settings and the directory of its run: leave out --config and --out",
    )
    return options


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
