"""Folders that commands fill: with what settings and from what, so that nothing else gets among it after a kill; and
the tables in them."""

from __future__ import annotations

import csv
import io
import json
import reprlib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from improved_diffusion.errors import UserError
from improved_diffusion.files import write_text

INPUTS = "inputs"  # of a description


def claim(description: Path, settings: Mapping[str, Any], advice: str) -> None:
    """Write to the file `description` with what `settings` the pictures of its folder are made; where there are some
    already, see that those are the same.

    Raises:
        UserError: they are not; the message names the first that differs, and gives the `advice`.
    """
    folder = description.parent
    if not description.is_file() or not holds_something(folder, besides=description):
        _write(description, settings)
        return
    other = _read(description, advice)
    for name, value in settings.items():
        if other.get(name) != value:
            was, now = map(reprlib.repr, (other.get(name), value))
            raise UserError(f"the pictures in {folder} were drawn with {name} {was}, not {now}: {advice}")


def claim_for(description: Path, settings: Mapping[str, Any], inputs: Mapping[str, str], advice: str) -> None:
    """`claim`, and see that results that are there already were made of the same. Others may join them later.

    Args:
        inputs: {file that is to be made in the folder: SHA-256 of what it is made of}.

    Raises:
        UserError: see `claim`; or one was made of something else; or the folder holds what no description tells of.
    """
    folder = description.parent
    if not description.is_file() and holds_something(folder):
        raise UserError(f"{folder} is not empty: {advice}")
    claim(description, settings, advice)
    known = _read(description, advice).get(INPUTS, {})
    for name, digest in inputs.items():
        if known.get(name) != digest and (folder / name).exists():
            raise UserError(f"{folder / name} was made of something else: {advice}")
    if known != {**known, **inputs}:
        _write(description, {**settings, INPUTS: {**known, **inputs}})


def holds_something(folder: Path, besides: Path | None = None) -> bool:
    """Whether anything is there but an empty folder, and hidden files, which a kill leaves half-written."""
    if not folder.is_dir():
        return folder.exists()
    return any(path != besides and not path.name.startswith(".") for path in folder.iterdir())


def write_csv(file: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """A table whose columns are the keys of its first row."""
    text = io.StringIO()
    writer = csv.DictWriter(text, fieldnames=list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_text(file, text.getvalue())


def markdown_table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """The lines of a table in Markdown; what would end a cell, |, is / in it."""
    lines = [f"| {' | '.join(cell.replace('|', '/') for cell in cells)} |" for cells in (columns, *rows)]
    return [lines[0], "|" + " --- |" * len(columns), *lines[1:]]


def _read(description: Path, advice: str) -> dict[str, Any]:
    try:
        return dict(json.loads(description.read_text()))
    except (ValueError, TypeError) as error:
        raise UserError(f"{description} is damaged: {advice}") from error


def _write(description: Path, content: Mapping[str, Any]) -> None:
    write_text(description, json.dumps(content, indent=2) + "\n")
