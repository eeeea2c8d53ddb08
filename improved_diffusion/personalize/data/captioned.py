"""Small sets of images with captions, as people have them: a folder or a parquet file.

A caption is found in one of these, in this order:

    metadata.jsonl     a line for each image: {"file_name": "a.png", "text": "..."}, or a list of several texts
    metadata.csv       the same as columns
    a.txt              beside a.png
    *.parquet          a column of image bytes and one of captions, as the Hugging Face hub stores data sets

a.mask.png beside a.png is no image but its mask, see masks.py.
Phone photographs are turned upright, transparent stickers composited on a colour of choice. What cannot be used is
skipped and named.
"""

from __future__ import annotations

import contextlib
import csv
import functools
import io
import json
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath

from PIL import Image, ImageColor

from improved_diffusion.data.containers import Folder, is_hidden
from improved_diffusion.data.decode import EXTENSIONS, decode_upright, open_encoded, to_rgb
from improved_diffusion.errors import UserError

CAPTION_COLUMNS = ("text", "caption", "en_text", "prompt")
IMAGE_COLUMNS = ("image", "img", "jpg", "png")
METADATA = ("metadata.jsonl", "metadata.csv")
MANIFEST = "manifest.json"  # of pictures that were drawn: how
MASK = ".mask"  # before the ending of an image's name: its mask


@dataclass(frozen=True)
class CaptionedImage:
    """One image, encoded, with its caption, or None where it has none."""

    name: str
    caption: str | None
    read: Callable[[], bytes]
    size: tuple[int, int] | None = None  # (width, height), upright; known once the image was found to be whole
    other_captions: tuple[str, ...] = ()  # that say the same in other words
    mask: Callable[[], Image.Image] | None = None  # mode L, of the image's size: what of it counts

    def load(self, background: str = "white") -> Image.Image:
        """RGB, upright, of its own size; raises whatever Pillow raises for a damaged file."""
        return decode_upright(self.read(), functools.partial(to_rgb, background=background))


def load_image(path: Path, background: str = "white") -> Image.Image:
    """The image in a file, as `CaptionedImage.load` gives it.

    Raises:
        UserError: no such file, or one that cannot be read.
    """
    try:
        return CaptionedImage(path.name, None, path.read_bytes).load(background)
    except Exception as error:  # Pillow raises almost anything on a damaged file
        missing = isinstance(error, FileNotFoundError)
        reason = "there is no such file" if missing else " ".join(str(error).split())
        raise UserError(f"cannot read the image {path}: {reason}") from error


@dataclass(frozen=True)
class CaptionedSet:
    """Images that can be read, in order of their names (in a parquet file, of its rows), and what was left out."""

    path: Path
    images: tuple[CaptionedImage, ...]
    skipped: tuple[str, ...]  # one line each: what and why

    def __len__(self) -> int:
        return len(self.images)

    def without_caption(self) -> list[str]:
        """Names of the images that have none."""
        return [image.name for image in self.images if image.caption is None]


def open_captioned_set(
    path: Path | str, *, background: str = "white", captions_required: bool = False, caption_column: str | None = None
) -> CaptionedSet:
    """The images at `path`, a folder or a parquet file, each decoded once to see that it can be.

    Args:
        path: where they lie; folders are searched with their subfolders.
        background: colour under transparent images, any that Pillow knows.
        captions_required: refuse a set in which an image has none.
        caption_column: of metadata or parquet; by default the first of CAPTION_COLUMNS that is there.

    Raises:
        UserError: nothing there, no usable image, a missing caption where they are required, damaged metadata, a
            colour that is none.
    """
    path = Path(path)
    try:
        ImageColor.getrgb(background)
    except ValueError as error:
        raise UserError(f"background {background!r} is no colour: use a name (white) or #rrggbb") from error
    if not path.exists():
        raise UserError(f"there is no folder or parquet file of images at {path}")
    skipped: list[str] = []
    is_folder = path.is_dir() and not any(path.glob("*.parquet"))
    if is_folder:
        candidates = list(_of_folder(path, caption_column, skipped))
    else:
        files = sorted(path.glob("*.parquet")) if path.is_dir() else [path]
        candidates = [image for file in files for image in _of_parquet(file, caption_column, captions_required)]
    images = []
    for image in candidates:
        try:
            size = image.load(background).size
        except Exception as error:  # Pillow raises almost anything on a damaged file
            skipped.append(f"{image.name}: {' '.join(str(error).split()) or type(error).__name__}")
        else:
            images.append(replace(image, size=size))
    if not images:
        first = f"; the first that was skipped is {skipped[0]}" if skipped else ""
        raise UserError(f"no usable images in {path}{first}")
    found = CaptionedSet(path, tuple(images), tuple(skipped))
    if captions_required and (missing := found.without_caption()):
        beside = f"write {PurePosixPath(missing[0]).with_suffix('.txt')} beside it, or list it in metadata.jsonl"
        advice = beside if is_folder else "fill in the caption of its row, or leave the row out"
        raise UserError(
            f"{len(missing)} of {len(found)} images in {path} have no caption, the first is {missing[0]}: {advice}"
        )
    return found


# ----------------------------------------------------------------------------------------------------------------------
# Folders


def _of_folder(path: Path, caption_column: str | None, skipped: list[str]) -> Iterator[CaptionedImage]:
    folder = Folder(path)
    names = sorted(name for name in folder.names() if not name.endswith("/") and not is_hidden(name))
    texts = {name for name in names if name.endswith(".txt")}
    captions = _metadata(path, caption_column)
    stems = {str(PurePosixPath(name).with_suffix("")) for name in names}
    for name in names:
        suffix = PurePosixPath(name).suffix.lower()
        if suffix not in EXTENSIONS:
            if name not in (*METADATA, MANIFEST) and suffix != ".txt":
                skipped.append(f"{name}: not an image")
            continue
        owner, is_mask, _ = name.rpartition(f"{MASK}{PurePosixPath(name).suffix}")
        if is_mask and owner in stems:
            continue
        caption, *others = captions.pop(name, ("",))
        beside = str(PurePosixPath(name).with_suffix(".txt"))
        if not caption and beside in texts:
            caption = _read_text(path / beside)
        read = functools.partial(folder.read, name)
        yield CaptionedImage(name, caption or None, read, other_captions=tuple(others))
    skipped += [f"{name}: listed in the metadata, but not there" for name in captions]


def _read_text(file: Path) -> str:
    try:
        return " ".join(file.read_text(encoding="utf-8-sig").split())
    except (OSError, UnicodeError) as error:
        raise UserError(f"cannot read the caption {file}: {error}") from error


def _metadata(path: Path, caption_column: str | None) -> dict[str, list[str]]:
    """{file name: captions} of metadata.jsonl or metadata.csv; empty where there is neither."""
    file = next((path / name for name in METADATA if (path / name).is_file()), None)
    if file is None and caption_column is not None:
        raise UserError(
            f"{path} has no {' or '.join(METADATA)} with a column {caption_column!r}: leave out images.caption_column, "
            "and the captions are those in the .txt files"
        )
    if file is None:
        return {}
    try:
        text = file.read_text(encoding="utf-8-sig")
        if file.suffix == ".csv":
            rows = list(csv.DictReader(io.StringIO(text)))
        else:
            rows = [json.loads(line) for line in text.splitlines() if line.strip()]
    except (OSError, ValueError, csv.Error) as error:
        raise UserError(f"cannot read {file}: {error}") from error
    captions = {}
    for number, row in enumerate(rows, 1):
        if not isinstance(row, dict) or not isinstance(row.get("file_name"), str):
            raise UserError(f"{file}, entry {number}: there is no file_name")
        column = caption_column or next((name for name in CAPTION_COLUMNS if name in row), CAPTION_COLUMNS[0])
        texts = row[column] if isinstance(row.get(column), list) else [row.get(column)]
        if not texts or not all(isinstance(text, str) for text in texts):
            raise UserError(f"{file}, entry {number} ({row['file_name']}): there is no text in {column!r}")
        captions[row["file_name"]] = [" ".join(text.split()) for text in texts]
    return captions


# ----------------------------------------------------------------------------------------------------------------------
# Parquet


def _of_parquet(file: Path, caption_column: str | None, captions_required: bool) -> Iterator[CaptionedImage]:
    import pyarrow.parquet

    try:
        table = pyarrow.parquet.read_table(file)
    except (OSError, pyarrow.ArrowException) as error:
        reason = _what_else(file) or f"it is damaged or no parquet file ({error})"
        raise UserError(f"cannot read {file}: {reason}") from error
    image_column = _column(file, table.column_names, IMAGE_COLUMNS, None, "images")
    images, captions = table.column(image_column), None
    if caption_column or captions_required or set(CAPTION_COLUMNS) & set(table.column_names):
        caption_column = _column(file, table.column_names, CAPTION_COLUMNS, caption_column, "captions")
        captions = table.column(caption_column)
    for row in range(table.num_rows):
        caption = captions[row].as_py() if captions is not None else None
        if caption is not None and not isinstance(caption, str):
            raise UserError(f"{file}: column {caption_column!r} holds {type(caption).__name__}, not text")
        yield CaptionedImage(
            f"{file.name}[{row}]",
            " ".join(caption.split()) or None if caption else None,
            lambda row=row: _image_bytes(images[row].as_py()),
        )


def _what_else(file: Path) -> str | None:
    """What people give in place of a parquet file, with the way out; None if it is nothing that is known."""
    if zipfile.is_zipfile(file):
        return "it is a zip archive: unpack it, and give the folder"
    with contextlib.suppress(Exception), open_encoded(file.read_bytes()):
        return "it is a single picture: give the folder that holds it"
    return None


def _column(file: Path, present: list[str], known: tuple[str, ...], wanted: str | None, what: str) -> str:
    names = (wanted,) if wanted else known
    found = next((name for name in names if name in present), None)
    if found is None:
        raise UserError(f"{file} has no column of {what}: looked for {', '.join(names)}, found {', '.join(present)}")
    return found


def _image_bytes(cell: object) -> bytes:
    """A cell is the bytes, or the hub's {"bytes": ..., "path": ...}."""
    if isinstance(cell, dict):
        cell = cell.get("bytes")
    if not isinstance(cell, bytes):
        raise ValueError("no image bytes in this row")
    return cell
