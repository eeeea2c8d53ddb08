"""The cut-out: train it on pictures with alpha, measure it, write it to a file.

python stickers.py segment COMMAND --help     the flags of a command
"""

from __future__ import annotations

import importlib

from improved_diffusion.commands import split_command

COMMANDS = {  # each is a module of improved_diffusion.stickers.segment.commands
    "train": "learn to cut out from pictures with alpha",
    "evaluate": "IoU, boundary F and alpha error on held-out pictures and styles, side by side",
    "export": "a trained cut-out as one small file",
}


def run(arguments: list[str]) -> None:
    command, rest = split_command(__doc__.splitlines()[0], COMMANDS, arguments)
    importlib.import_module(f"improved_diffusion.stickers.segment.commands.{command}").run(rest)
