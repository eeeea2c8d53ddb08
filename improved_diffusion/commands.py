"""A command line of several commands, each in a module of its own, which is imported only when it is asked for."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence

from improved_diffusion.errors import ArgumentParser


def split_command(description: str, commands: Mapping[str, str], arguments: Sequence[str]) -> tuple[str, list[str]]:
    """The command, one of `commands` {name: what it does}, and its own arguments."""
    parser = ArgumentParser(
        description=description,
        epilog="\n".join(["commands:", *(f"  {name:10} {what}" for name, what in commands.items())]),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("command", choices=commands, metavar="COMMAND", help="one of those below")
    parser.add_argument("arguments", nargs=argparse.REMAINDER, metavar="...", help="of the command")
    options = parser.parse_args(arguments)
    return options.command, options.arguments
