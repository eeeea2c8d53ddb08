"""Everything at once: worker, status page, page, and the bot if there is a token. What dies is started again."""

from __future__ import annotations

import importlib
import multiprocessing
import os
import time
from multiprocessing.process import BaseProcess

from improved_diffusion.errors import UserError, user_errors_exit
from improved_diffusion.serving.commands.init import make_home
from improved_diffusion.serving.commands.options import command_parser, stop_signal
from improved_diffusion.serving.config import ServingConfig, config_file, load_serving_config

SECONDS_TO_STOP = 30.0
SECONDS_BETWEEN_LOOKS = 0.5
SECONDS_BETWEEN_TRIES = 5.0
TOKENS = ("TELEGRAM_TOKEN", "TELEGRAM_TOKEN_FILE")
MISTAKE = 2  # the exit status of a command that cannot work as it was asked to


def run(arguments: list[str]) -> None:
    home = command_parser("up", __doc__).parse_args(arguments).home
    if not config_file(home).is_file():
        make_home(ServingConfig(home=home))
    load_serving_config(home)
    commands = ["worker", "page", *(["bot"] if any(name in os.environ for name in TOKENS) else [])]
    stop = stop_signal()
    started = {command: _start(command, home) for command in commands}
    again = set()
    print("Ctrl-C stops, and what is queued stays queued", flush=True)
    try:
        while not stop.wait(SECONDS_BETWEEN_LOOKS):
            for command, process in started.items():
                if process.exitcode == MISTAKE and command not in again:
                    raise UserError(f"the {command} could not start, as it says above")
                if process.exitcode is not None:
                    print(f"the {command} died ({process.exitcode}) and is started again", flush=True)
                    if process.exitcode == MISTAKE:  # it has worked before: what it needs is away, Telegram for one
                        stop.wait(SECONDS_BETWEEN_TRIES)
                    again.add(command)
                    started[command] = _start(command, home)
    finally:
        _stop(list(started.values()))


def _start(command: str, home: str) -> BaseProcess:
    process = multiprocessing.get_context("spawn").Process(target=_run, args=(command, home), daemon=True)
    process.start()
    print(f"{command}: process {process.pid}", flush=True)
    return process


def _run(command: str, home: str) -> None:
    """In a process of its own."""
    with user_errors_exit():
        importlib.import_module(f"improved_diffusion.serving.commands.{command}").run(["--home", home])


def _stop(processes: list[BaseProcess]) -> None:
    for process in processes:
        process.terminate()
    deadline = time.monotonic() + SECONDS_TO_STOP
    for process in processes:
        process.join(max(0.0, deadline - time.monotonic()))
        process.kill()
