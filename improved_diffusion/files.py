"""Writing files so that a kill at any moment leaves the old one or the new one, never half of one; their hashes, and
locks, so that one process writes at a time."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from improved_diffusion.errors import UserError


@contextlib.contextmanager
def atomic_write(path: Path | str, *, durable: bool = True) -> Iterator[Path]:
    """Yield a temporary path beside `path`; when the block ends well, sync it to disk and rename it to `path`.

    Without `durable` it is not synced: whole or absent after a kill, but not after a crash of the machine.

    Raises:
        UserError: the file cannot be written (no space left, no permission); the temporary file is removed.
    """
    path = Path(path).resolve()  # of a link, the file that it names
    temporary: Path | None = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
        os.close(handle)
        temporary = Path(name)
        yield temporary
        temporary.chmod(0o666 & ~_umask())  # only now: what fills it may have made a private file of its own
        if durable:
            with temporary.open("rb") as file:
                os.fsync(file.fileno())
        temporary.replace(path)
    except OSError as error:
        raise UserError(f"could not write {path}: {error.strerror or error}") from error
    finally:
        if temporary is not None:
            temporary.unlink(missing_ok=True)


def write_text(path: Path | str, text: str, *, durable: bool = True) -> None:
    """Write `text` to `path` in UTF-8; see `atomic_write`."""
    with atomic_write(path, durable=durable) as temporary:
        temporary.write_text(text, encoding="utf-8")


@contextlib.contextmanager
def exclusive(lock_file: Path, refusal: str) -> Iterator[None]:
    """Hold `lock_file` while the block lasts; its folder is made if it is not there.

    The system lets go of the lock when the process ends, however it ends. The file stays, unless the block removes it:
    still locked, so that who has opened it meanwhile sees that it has gone.

    Raises:
        UserError: another process holds it, as `refusal` says; or it cannot be made.
    """
    lock = FileLock(lock_file)
    try:
        lock_file.parent.mkdir(parents=True, exist_ok=True)
        lock.acquire(timeout=0)
    except Timeout:
        raise UserError(refusal) from None
    except OSError as error:
        raise UserError(f"could not write {lock_file.parent}: {error.strerror or error}") from error
    try:
        yield
    finally:
        lock.release()


def file_sha256(path: Path) -> str:
    """SHA-256 of a file, as hexadecimal."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def _umask() -> int:
    """The process's umask, which can only be read by setting it (mkstemp ignores it and makes private files)."""
    mask = os.umask(0)
    os.umask(mask)
    return mask


def read_jsonl(file: Path) -> list[dict[str, Any]]:
    """The objects of a file with one JSON object per line; a line that a kill cut short is left out."""
    if not file.is_file():
        return []
    records = []
    for line in file.read_text(errors="replace").splitlines():
        with contextlib.suppress(json.JSONDecodeError):
            records.append(json.loads(line))
    return [record for record in records if isinstance(record, dict) and isinstance(record.get("step"), int)]
