"""Progress of long work: a bar on a terminal, and elsewhere, in a log say, a line every so often."""

from __future__ import annotations

import sys
from typing import Any

from tqdm import tqdm

SECONDS_BETWEEN_LINES = 30


class _Lines(tqdm):
    """Prints each state on a line of its own instead of over the last one."""

    def display(self, msg: str | None = None, pos: int | None = None) -> bool:
        if self.n:
            self.fp.write(f"{msg or self}\n")
            self.fp.flush()
        return True


def progress(**settings: Any) -> tqdm:
    """A tqdm with `settings`, to be used as a context manager, that suits where standard error goes."""
    if sys.stderr.isatty():
        return tqdm(**settings)
    return _Lines(**{**settings, "mininterval": SECONDS_BETWEEN_LINES, "maxinterval": SECONDS_BETWEEN_LINES})
