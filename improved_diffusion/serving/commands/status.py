"""How the queue stands: jobs, waits, throughput, workers."""

from __future__ import annotations

from improved_diffusion.serving.commands.options import command_parser
from improved_diffusion.serving.config import load_serving_config


def run(arguments: list[str]) -> None:
    config = load_serving_config(command_parser("status", __doc__).parse_args(arguments).home)

    from improved_diffusion.serving.queue import JobQueue
    from improved_diffusion.serving.summary import summarize

    print(summarize(JobQueue(config)))
