"""Serving the page of a survey to several people at once, and collecting their answers."""

from __future__ import annotations

import json
import re
import sys
import threading
from dataclasses import asdict
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from improved_diffusion.errors import UserError
from improved_diffusion.files import atomic_write
from improved_diffusion.personalize.studies.survey.form import Answers, key_path, parse_answers, read_key

LARGEST = 1 << 20  # bytes of one person's answers
SECONDS = 30  # without a byte from a browser until its connection is dropped


class SurveyServer(ThreadingHTTPServer):
    """GET / is the page; POST /answers leaves a file in `folder`, one for each person. Nothing else is served.

    Args:
        page: the HTML file, with its key beside it.
        folder: made where it is not there.
        host: 127.0.0.1 is reached from this machine alone, 0.0.0.0 from its network.
        port: 0 takes any that is free, which `server_port` then tells.

    Raises:
        UserError: no page or key, a key of another page, or an address that cannot be had.
    """

    daemon_threads = True  # a browser that holds its connection does not keep the program from ending

    def __init__(self, page: Path, folder: Path, host: str = "127.0.0.1", port: int = 8000):
        self.key = read_key(key_path(page))
        try:
            self.page = page.read_bytes()
        except OSError as error:
            raise UserError(f"cannot read the page {page}: {error.strerror}") from error
        if f'{{"id": "{self.key.survey}"'.encode() not in self.page:
            raise UserError(f"{key_path(page)} is the key of another survey than {page}")
        self.folder = folder
        self._writing = threading.Lock()
        try:
            super().__init__((host, port), _Handler)
        except (OSError, OverflowError) as error:
            raise UserError(f"cannot serve at {host}, port {port}: {error}") from error

    def keep(self, answers: Answers) -> None:
        """Write a person's answers, in place of what they sent before. Raises UserError where that fails."""
        # One at a time: atomic_write changes the umask for a moment, and that is the whole process's.
        with self._writing, atomic_write(self.folder / answers.file_name) as temporary:
            temporary.write_text(json.dumps(asdict(answers)) + "\n")

    def handle_error(self, *request: object) -> None:
        """Without the traceback where a browser has only hung up."""
        if not isinstance(sys.exc_info()[1], ConnectionError):
            super().handle_error(*request)


class _Handler(BaseHTTPRequestHandler):
    server: SurveyServer
    timeout = SECONDS

    def do_GET(self) -> None:
        if self.path == "/":
            self._reply(HTTPStatus.OK, self.server.page, "text/html")
        else:
            self._reply(HTTPStatus.NOT_FOUND, b"the survey is at /")

    def do_POST(self) -> None:
        status, message = self._receive()
        self._reply(status, message.encode())

    def _receive(self) -> tuple[HTTPStatus, str]:
        if self.path != "/answers":
            return HTTPStatus.NOT_FOUND, "answers go to /answers"
        length = self.headers.get("Content-Length", "")
        if not re.fullmatch(r"[0-9]{1,12}", length):
            return HTTPStatus.BAD_REQUEST, "the request does not say how long it is"
        if int(length) > LARGEST:
            return HTTPStatus.REQUEST_ENTITY_TOO_LARGE, f"answers have at most {LARGEST:,} bytes"
        try:
            answers = parse_answers(self.rfile.read(int(length)), self.server.key)
        except UserError as error:
            return HTTPStatus.BAD_REQUEST, f"what was sent {error}"
        try:
            self.server.keep(answers)
        except UserError as error:
            return HTTPStatus.INTERNAL_SERVER_ERROR, str(error)
        print(f"{answers.file_name}: {len(answers.answers)} of {len(self.server.key.images)} images", flush=True)
        return HTTPStatus.OK, "kept"

    def _reply(self, status: HTTPStatus, content: bytes, kind: str = "text/plain") -> None:
        self.send_response(status)
        self.send_header("Content-Type", f"{kind}; charset=utf-8")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_: object) -> None:
        """Silent: what is worth a line is whose answers came."""
