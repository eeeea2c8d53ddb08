"""The page, until it is stopped: pictures of texts, photos and classes, by way of the queue."""

from __future__ import annotations

import importlib.util
import os
import socket
import sys
from pathlib import Path

from improved_diffusion.errors import UserError
from improved_diffusion.serving.commands.options import command_parser
from improved_diffusion.serving.config import load_serving_config

APP = Path(__file__).parents[1] / "page" / "app.py"


def run(arguments: list[str]) -> None:
    parser = command_parser("page", __doc__)
    parser.add_argument("--port", type=int, help="default: as the settings say")
    options = parser.parse_args(arguments)
    config = load_serving_config(options.home)
    port = config.page_port if options.port is None else options.port
    if importlib.util.find_spec("streamlit") is None:
        raise ModuleNotFoundError("no streamlit", name="streamlit")
    require_free(config.host, port)
    settings = {
        "server.address": config.host,
        "server.port": port,
        "server.headless": "true",  # it opens no browser
        "server.fileWatcherType": "none",
        "server.maxUploadSize": max(1, config.limits.upload_bytes // 1_000_000),  # MB
        "browser.gatherUsageStats": "false",
        "client.toolbarMode": "viewer",
        "client.showErrorDetails": "none",
        "logger.level": "error",
    }
    flags = [text for name, value in settings.items() for text in (f"--{name}", str(value))]
    # In place of this process, so that what stops it stops Streamlit.
    os.execv(sys.executable, [sys.executable, "-m", "streamlit", "run", str(APP), *flags, "--", str(config.folder)])


def require_free(host: str, port: int) -> None:
    """Raise UserError where the page's address cannot be had."""
    try:
        socket.create_server((host, port)).close()
    except (OSError, OverflowError) as error:
        raise UserError(f"cannot serve the page at {host}, port {port}: {error}; choose another with --port") from error
