"""Make a server's home, or change its settings: python serve.py init --models.styles '{dog: runs/dog}'."""

from __future__ import annotations

from pathlib import Path

import yaml

from improved_diffusion.files import write_text
from improved_diffusion.serving.config import ServingConfig, config_file
from improved_diffusion.settings import parse_arguments, read_settings, settings_parser, to_plain, to_settings


def run(arguments: list[str]) -> None:
    parser = settings_parser(ServingConfig, prog="serve.py init", description=__doc__.split(":")[0] + ".")
    home = parse_arguments(parser, arguments).home
    file = config_file(home)
    settings = {**read_settings(file), "home": home} if file.is_file() else {}
    make_home(to_settings(ServingConfig, parser, parse_arguments(parser, arguments, settings, str(file))))
    print(f"{home} is ready: its settings are in {file}; start with python serve.py up --home {home}")


def make_home(config: ServingConfig) -> None:
    """Write the settings, and make folders and tables where they are not there; what is queued stays.

    Raises:
        UserError: they cannot be written, or the database cannot be reached.
    """
    from improved_diffusion.serving.database import create_database  # takes seconds to import

    write_text(config_file(config.home), yaml.safe_dump(to_plain(config), sort_keys=False))
    Path(config.home).chmod(0o700)  # what users ask for, and the addresses of their pages, are nobody else's
    for folder in (config.uploads, config.results):
        folder.mkdir(mode=0o700, exist_ok=True)
    create_database(config)
