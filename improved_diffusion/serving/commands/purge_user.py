"""Remove everything of a user: jobs, pictures, uploads, ledger."""

from __future__ import annotations

from improved_diffusion.serving.commands.options import command_parser
from improved_diffusion.serving.config import load_serving_config


def run(arguments: list[str]) -> None:
    parser = command_parser("purge-user", __doc__)
    parser.add_argument("user", metavar="ID", help="telegram:NUMBER, for one")
    options = parser.parse_args(arguments)
    if not options.user.startswith(("telegram:", "page:")):
        parser.error(f"users are telegram:NUMBER or page:ADDRESS, not {options.user}")
    config = load_serving_config(options.home)

    from improved_diffusion.serving.queue import JobQueue

    print(f"{JobQueue(config).purge(options.user)} jobs of {options.user} removed, and all else of that user")
