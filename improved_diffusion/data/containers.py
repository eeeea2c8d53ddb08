"""What holds image files: a folder or a zip archive. Both list names and read what is under one."""

from __future__ import annotations

import contextlib
import functools
import os
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from improved_diffusion.errors import UserError

JUNK = {"__MACOSX", "Thumbs.db", "desktop.ini"}  # left by operating systems, as are names with a leading dot


@dataclass(frozen=True)
class Folder:
    """The files below `root`, each named by its path relative to it, folders joined by '/'."""

    root: Path

    def names(self) -> Iterator[str]:
        """Names of all files, and of all folders with a final '/'. Links are followed, but not to a folder that holds
        them."""

        def fail(error: OSError) -> None:
            raise UserError(f"cannot read folder {error.filename}: {error.strerror}")

        way = {str(self.root): [os.path.realpath(self.root)]}  # folder -> where it and those above it really are
        for parent, folders, files in os.walk(self.root, onerror=fail, followlinks=True):
            above = way.pop(parent)
            for folder in folders:
                path = os.path.join(parent, folder)
                way[path] = [*above, os.path.realpath(path)]
            folders[:] = [folder for folder in folders if way[os.path.join(parent, folder)][-1] not in above]
            relative = os.path.relpath(parent, self.root)
            prefix = "" if relative == "." else f"{relative}/"
            yield from (f"{prefix}{folder}/" for folder in folders)
            yield from (prefix + file for file in files)

    def read(self, name: str) -> bytes:
        return (self.root / name).read_bytes()


@dataclass(frozen=True)
class Archive:
    """The members of the zip file at `path`."""

    path: Path

    def names(self) -> Iterator[str]:
        """Names of all files, and of the folders that have an entry of their own with a final '/'."""
        yield from self._members

    def read(self, name: str) -> bytes:
        return self._zip.read(self._members[name])

    @functools.cached_property
    def _zip(self) -> zipfile.ZipFile:
        return zipfile.ZipFile(self.path)

    @functools.cached_property
    def _members(self) -> dict[str, zipfile.ZipInfo]:
        return {_member_name(member).removeprefix("./"): member for member in self._zip.infolist()}

    def __reduce__(self) -> tuple:  # an open zip file cannot go to another process, which opens its own
        return Archive, (self.path,)


def _member_name(member: zipfile.ZipInfo) -> str:
    """The member's name. Without the UTF-8 flag, `zipfile` assumes the old code page 437, but most writers that do not
    set the flag (macOS, for one) store UTF-8 all the same. Some on Windows put backslashes between folders."""
    name = member.filename
    if not member.flag_bits & 0x800:
        with contextlib.suppress(UnicodeError):
            name = name.encode("cp437").decode("utf-8")
    return name if "/" in name else name.replace("\\", "/")


def is_hidden(name: str) -> bool:
    return any(part.startswith(".") or part in JUNK for part in name.split("/"))
