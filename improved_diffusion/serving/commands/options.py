"""What the commands share."""

from __future__ import annotations

from improved_diffusion.errors import ArgumentParser

HOME = "serving"


def command_parser(name: str, description: str) -> ArgumentParser:
    """A parser with the flag that all commands have."""
    parser = ArgumentParser(prog=f"serve.py {name}", description=description)
    parser.add_argument("--home", default=HOME, help="folder of the server (default: %(default)s)")
    return parser
