"""SHA-256 sums of large arrays, each computed once and then known by the state of its file."""

from __future__ import annotations

import contextlib
import hashlib
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock, Timeout

from improved_diffusion.cache import cache_directory
from improved_diffusion.errors import UserError
from improved_diffusion.files import atomic_write

HASH_CHUNK_BYTES = 1 << 24
SETTLED_NS = 2 * 10**9  # coarsest step of a file system's clock: within it a file may change and keep its time
LOCK_SECONDS = 600  # after which a process sums up for itself: the lock may be one that a crash left


def array_sha256(array: np.ndarray) -> str:
    """SHA-256 hex of the array's bytes in C order, read in pieces so that a memory map is never copied whole."""
    digest = hashlib.sha256()
    rows = max(1, HASH_CHUNK_BYTES // max(1, array[:1].nbytes))
    for start in range(0, len(array), rows):
        digest.update(np.ascontiguousarray(array[start : start + rows]))
    return digest.hexdigest()


def file_array_sha256(file: Path, array: np.ndarray, *, anew: bool = False) -> str:
    """`array_sha256` of the `array` that lies in `file`; from the cache directory, unless `anew`, where the file has
    the path, size and times that it had when it was summed up.

    Of several processes that ask for the same at once, one computes it and the others wait. Where the cache directory
    cannot be written each computes it.
    """
    record = cache_directory() / "sums" / f"{hashlib.sha256(str(file.resolve()).encode()).hexdigest()[:32]}.json"
    state = _state(file)
    known = None if anew else _read(record, state)
    if known:
        return known
    with _lock(record.with_suffix(".lock")):
        known = None if anew else _read(record, state)
        if known:
            return known
        digest = array_sha256(array)
        if time.time_ns() - state["mtime_ns"] > SETTLED_NS and _state(file) == state:
            with contextlib.suppress(UserError), atomic_write(record, durable=False) as temporary:
                temporary.write_text(json.dumps({**state, "sha256": digest}) + "\n")
    return digest


def _state(file: Path) -> dict[str, Any]:
    """What changes when the file does; the time of the last change of its inode too, which nobody can set."""
    found = file.stat()
    times = {"mtime_ns": found.st_mtime_ns, "ctime_ns": found.st_ctime_ns}
    return {"path": str(file.resolve()), "size": found.st_size, **times}


def _read(record: Path, state: dict[str, Any]) -> str | None:
    """The sum in `record`, if it is of a file in that state."""
    try:
        known = json.loads(record.read_text())
        digest = known.pop("sha256")
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        return None
    return digest if known == state else None


@contextlib.contextmanager
def _lock(file: Path) -> Iterator[None]:
    """Hold the lock `file`, if that can be had in a while; it is removed in the end."""
    lock = FileLock(file)
    with contextlib.suppress(OSError, Timeout):
        file.parent.mkdir(parents=True, exist_ok=True)
        lock.acquire(timeout=LOCK_SECONDS)
    try:
        yield
    finally:
        if lock.is_locked:
            file.unlink(missing_ok=True)
        lock.release()
