"""What the commands share."""

from __future__ import annotations

import signal
import threading

from improved_diffusion.errors import ArgumentParser

HOME = "serving"


def command_parser(name: str, description: str) -> ArgumentParser:
    """A parser with the flag that all commands have."""
    parser = ArgumentParser(prog=f"serve.py {name}", description=description)
    parser.add_argument("--home", default=HOME, help="folder of the server (default: %(default)s)")
    return parser


def stop_signal() -> threading.Event:
    """Set by Ctrl-C and SIGTERM. By handlers: a mask would not reach threads that libraries have started already, and
    multiprocessing takes it away."""
    stop = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: stop.set())
    return stop
