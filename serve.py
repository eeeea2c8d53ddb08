"""Serve pictures to many people from one device: a durable queue, the worker that draws, a page, a bot.

python serve.py COMMAND --help     the flags of a command
"""

from __future__ import annotations

import importlib
import sys

from improved_diffusion.commands import split_command
from improved_diffusion.errors import UserError, user_errors_exit

COMMANDS = {  # each is a module of improved_diffusion.serving.commands
    "init": "make a server's home, or change its settings",
    "up": "everything at once, to try it out: worker, page, bot",
    "worker": "draw what is queued; one for each device",
    "page": "the web page",
    "bot": "the Telegram bot",
    "status": "how the queue stands",
    "purge-user": "remove everything of a user",
}


def main(arguments: list[str]) -> None:
    command, rest = split_command(__doc__.splitlines()[0], COMMANDS, arguments)
    module = command.replace("-", "_")
    try:
        importlib.import_module(f"improved_diffusion.serving.commands.{module}").run(rest)
    except ModuleNotFoundError as error:
        if error.name.startswith("improved_diffusion"):
            raise
        raise UserError(f"{error.name} is missing: in the checkout, pip install -e '.[serving]'") from error


if __name__ == "__main__":
    with user_errors_exit():
        main(sys.argv[1:])
