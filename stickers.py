"""Make stickers of photographs: a caption, a picture in a learned style, a cut-out, a file that Telegram takes.

python stickers.py COMMAND --help     the flags of a command
"""

from __future__ import annotations

import importlib
import sys

from improved_diffusion.commands import split_command
from improved_diffusion.errors import UserError, user_errors_exit
from improved_diffusion.personalize.quiet import quieten_libraries

COMMANDS = {  # each is a module of improved_diffusion.stickers.commands
    "make": "stickers of photographs: all stages, and a sheet of them",
    "caption": "what photographs show, by BLIP",
    "restyle": "photographs drawn anew in a learned style",
    "cut": "the foreground of pictures, transparent",
    "finish": "from a cut-out to a file that Telegram takes",
    "measure": "Inception Score, FID, LPIPS and ERGAS of sets of stickers",
    "prompts": "which prompt tells good stickers from bad ones, or draws the best",
    "segment": "train the cut-out, measure it, write it to a file",
}


def main(arguments: list[str]) -> None:
    command, rest = split_command(__doc__.splitlines()[0], COMMANDS, arguments)
    quieten_libraries()
    try:
        importlib.import_module(f"improved_diffusion.stickers.commands.{command}").run(rest)
    except ModuleNotFoundError as error:
        if error.name.startswith("improved_diffusion"):
            raise
        raise UserError(f"{error.name} is missing: in the checkout, pip install -e '.[stickers]'") from error


if __name__ == "__main__":
    with user_errors_exit():
        main(sys.argv[1:])
