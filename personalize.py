"""Fine-tune Stable Diffusion or SDXL on a few images, and measure what came of it.

python personalize.py COMMAND --help     the flags of a command
"""

from __future__ import annotations

import argparse
import importlib
import os
import sys
import warnings

from improved_diffusion.errors import ArgumentParser, UserError, user_errors_exit

COMMANDS = {  # each is a module of improved_diffusion.personalize.commands
    "tokens": "which rare token can stand for a subject",
}


def main(arguments: list[str]) -> None:
    parser = ArgumentParser(
        description=__doc__.splitlines()[0],
        epilog="\n".join(["commands:", *(f"  {name:10} {what}" for name, what in COMMANDS.items())]),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("command", choices=COMMANDS, metavar="COMMAND", help="one of those below")
    parser.add_argument("arguments", nargs=argparse.REMAINDER, metavar="...", help="of the command")
    options = parser.parse_args(arguments)
    warnings.simplefilter("ignore")  # of the libraries, on their own future
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    command = importlib.import_module(f"improved_diffusion.personalize.commands.{options.command}")
    try:
        command.run(options.arguments)
    except ModuleNotFoundError as error:
        raise UserError(f"{error.name} is missing: pip install 'improved_diffusion[personalize]'") from error


if __name__ == "__main__":
    with user_errors_exit():
        main(sys.argv[1:])
