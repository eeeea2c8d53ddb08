"""Sets of pictures with alpha, as the data floor's icons come: a folder or a zip, with names in metadata.jsonl."""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from PIL import Image

from improved_diffusion.data.containers import Archive, Folder
from improved_diffusion.data.decode import decode_upright, to_rgb, to_rgba
from improved_diffusion.data.image_set import is_image_set, open_image_set
from improved_diffusion.data.labelled_files import labelled_folder
from improved_diffusion.data.names import base_name, is_held_out
from improved_diffusion.errors import UserError

METADATA = "metadata.jsonl"
NAMES = ("base", "name", "text")  # keys of its lines that say what a picture shows, the first that is there


@dataclass(frozen=True)
class Picture:
    """One picture of a set."""

    container: Folder | Archive
    file: str
    base: str
    """What it shows: see `base_name`."""

    def load(self) -> Image.Image:
        """RGBA, cut to what is not wholly transparent. Raises whatever Pillow raises for a damaged file."""
        picture = decode_upright(self.container.read(self.file), to_rgba)
        return picture.crop(picture.getchannel("A").getbbox())


@dataclass(frozen=True)
class Pictures:
    """Those of one or several sets, in order of their files; `skipped` says in a line each what cannot be used."""

    path: str
    pictures: tuple[Picture, ...]
    content_hash: str
    skipped: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.pictures)

    def split(self, share: float) -> tuple[tuple[Picture, ...], tuple[Picture, ...]]:
        """Those to train on; and of those that are held out, the first of each base name, so that no two are alike.

        Raises:
            UserError: one of both is empty.
        """
        training = tuple(one for one in self.pictures if not is_held_out(one.base, share))
        held_out = {one.base: one for one in reversed(self.pictures) if is_held_out(one.base, share)}
        if not training or not held_out:
            raise UserError(f"{self.path} has too few names to hold out {share:g} of them: give more pictures")
        return training, tuple(reversed(held_out.values()))


def open_pictures(path: str | Path) -> Pictures:
    """The pictures with alpha in a folder or a zip file, each decoded once to see that it can be. Their names are
    in metadata.jsonl, or else those of their files.

    Raises:
        UserError: no such thing, damaged metadata, or no picture that is transparent anywhere.
    """
    files = labelled_folder(path)
    names = _names(files.container, str(path))
    found, skipped, digest, cut_out = [], [], hashlib.sha256(), 0
    for file, _ in (item for items in files.splits.values() for item in items):
        picture = Picture(files.container, file, base_name(names.get(file, PurePosixPath(file).stem)))
        try:
            content = files.container.read(file)
            lowest, highest = decode_upright(content, to_rgba).getchannel("A").getextrema()
        except Exception as error:  # Pillow raises almost anything on a damaged file
            skipped.append(f"{file}: {' '.join(str(error).split()) or type(error).__name__}")
            continue
        if highest == 0:
            skipped.append(f"{file}: nothing but transparency")
            continue
        cut_out += lowest < highest
        digest.update(f"{file} {picture.base} {hashlib.sha256(content).hexdigest()}\n".encode())
        found.append(picture)
    if not cut_out:
        reason = f"; the first that was skipped is {skipped[0]}" if skipped else ""
        raise UserError(f"{path} has no pictures with transparency, which a cut-out is learned from{reason}")
    return Pictures(str(path), tuple(found), digest.hexdigest(), tuple(skipped))


def joined(sets: Sequence[Pictures]) -> Pictures:
    """Several sets as one."""
    digest = hashlib.sha256("\n".join(one.content_hash for one in sets).encode()).hexdigest()
    pictures = tuple(picture for one in sets for picture in one.pictures)
    skipped = tuple(line for one in sets for line in one.skipped)
    return Pictures(", ".join(one.path for one in sets), pictures, digest, skipped)


def _names(container: Folder | Archive, path: str) -> dict[str, str]:
    if METADATA not in set(container.names()):
        return {}
    try:
        rows = [json.loads(line) for line in container.read(METADATA).decode("utf-8-sig").splitlines() if line.strip()]
        return {row["file_name"]: next(str(row[key]) for key in NAMES if key in row) for row in rows}
    except (OSError, ValueError, LookupError, TypeError, StopIteration) as error:
        raise UserError(f"{path}: {METADATA} is damaged, a line needs file_name and text: {error}") from error


# ----------------------------------------------------------------------------------------------------------------------
# Photographs


@dataclass(frozen=True)
class Photographs:
    """Photographs of folders, zip files and packed sets (paths), one after another."""

    paths: tuple[str, ...]

    def __len__(self) -> int:
        return sum(len(source) for source in self._sources)

    def load(self, index: int) -> Image.Image:
        """RGB. Raises whatever Pillow raises for a damaged file."""
        for source in self._sources:
            if index < len(source):
                return source.load(index)
            index -= len(source)
        raise IndexError(index)

    @functools.cached_property
    def _sources(self) -> list[_Packed | _Files]:
        """Raises UserError for a path that is none of these."""
        return [_Packed(path) if is_image_set(Path(path)) else _Files(path) for path in self.paths]

    def __reduce__(self) -> tuple:  # other processes open them for themselves
        return Photographs, (self.paths,)


class _Packed:
    def __init__(self, path: str):
        self.images = open_image_set(path).images

    def __len__(self) -> int:
        return len(self.images)

    def load(self, index: int) -> Image.Image:
        pixels = self.images[index]
        return to_rgb(Image.fromarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels))


class _Files:
    def __init__(self, path: str):
        files = labelled_folder(path)
        self.container = files.container
        self.files = [name for items in files.splits.values() for name, _ in items]

    def __len__(self) -> int:
        return len(self.files)

    def load(self, index: int) -> Image.Image:
        return decode_upright(self.container.read(self.files[index]), to_rgb)
