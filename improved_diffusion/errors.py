"""Errors meant for the person at the terminal: one clear line and exit status 2, never a traceback."""

from __future__ import annotations

import argparse
import contextlib
import os
import re
import sys
from collections.abc import Iterator
from typing import NoReturn


class UserError(Exception):
    """Bad input. The message is one line that says what is wrong, where, and what to do about it."""


class ArgumentParser(argparse.ArgumentParser):
    """One whose complaint about a flag is one line too, without the usage before it."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message} (see {self.prog} --help)")


def is_out_of_memory(error: Exception) -> bool:
    """Whether Python, numpy (a MemoryError) or PyTorch (on a CPU any RuntimeError) found no memory."""
    said = re.search("out of memory|can't allocate memory|_STATUS_ALLOC_FAILED", str(error))
    return isinstance(error, MemoryError) or said is not None


def is_device_lost(error: Exception) -> bool:
    """Whether a GPU refuses all further work of this process, as it does after an illegal memory access."""
    said = re.search("CUDA error|_STATUS_EXECUTION_FAILED", str(error))
    return said is not None and not is_out_of_memory(error)


@contextlib.contextmanager
def user_errors_exit() -> Iterator[None]:
    """Wrap a command line's `main`: a `UserError` prints `error: ...` and exits 2, and so do a path that the system
    refuses and a want of memory; Ctrl-C exits 130."""
    try:
        yield
    except UserError as error:
        message = " ".join(str(error).split())
        print(f"error: {message}", file=sys.stderr)
        sys.exit(2)
    except BrokenPipeError:  # whoever read the output has gone, `head` for one
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python complains once more at its end
        sys.exit(1)
    except OSError as error:
        if error.filename is None:
            raise
        print(f"error: {error.filename}: {error.strerror}", file=sys.stderr)
        sys.exit(2)
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        print(f"error: out of memory, use smaller batches, for one: {reason}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)
