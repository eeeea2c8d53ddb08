"""The pictures that a command is given, and what becomes of each: a file of its name, made once."""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from improved_diffusion.data import decode, photo
from improved_diffusion.errors import UserError
from improved_diffusion.files import atomic_write, file_sha256
from improved_diffusion.progress import progress
from improved_diffusion.results import claim_for

MANIFEST = "manifest.json"
LIMITS = photo.PhotoLimits(
    nbytes=100_000_000,
    pixels=80_000_000,
    side=2048,
    formats=tuple(kind for kind in decode.FORMATS if kind in (*photo.FORMATS, "HEIF")),
)


@dataclass(frozen=True)
class Photo:
    """A picture's file."""

    name: str  # of what is made of it, without an extension
    path: Path
    digest: str  # SHA-256 of all that what is made of it depends on

    def load(self, convert: Callable[[Image.Image], Image.Image] = decode.to_rgb) -> Image.Image:
        """Upright, at most LIMITS.side pixels a side, by default RGB. Raises UserError as `data.photo.clean` does."""
        photo.require_size(self.path.stat().st_size, LIMITS)
        return photo.clean(self.path.read_bytes(), LIMITS, convert)

    def load_transparent(self) -> Image.Image:
        """RGBA where the file has transparency, RGB where it has none; else as `load`."""
        return self.load(lambda image: decode.to_rgba(image) if image.has_transparency_data else decode.to_rgb(image))


def find_photos(paths: Sequence[Path]) -> list[Photo]:
    """The pictures at `paths`, whose content is not looked at yet.

    Raises:
        UserError: one is no file, or two have one name.
    """
    found: dict[str, Photo] = {}
    for path in paths:
        if path.is_dir():
            raise UserError(f"{path} is a folder: give the pictures in it, {path}/* say")
        if not path.is_file():
            raise UserError(f"there is no picture at {path}")
        if path.stem in found:
            raise UserError(
                f"what is made of {found[path.stem].path} and {path} would have one name: rename one of them"
            )
        try:
            found[path.stem] = Photo(path.stem, path, file_sha256(path))
        except OSError as error:
            raise UserError(f"cannot read {path}: {error.strerror}") from error
    return list(found.values())


@dataclass(frozen=True)
class Outcome:
    """Of a command on several pictures."""

    made: dict[str, Path]  # {name: file}, those that were there already among them
    refused: list[str]  # a line for each picture of which nothing was made

    def photos(self) -> list[Photo]:
        """What was made, as the next stage takes it."""
        return [Photo(name, file, file_sha256(file)) for name, file in self.made.items()]


def make_each(
    photos: Sequence[Photo],
    out: Path,
    suffix: str,
    settings: Mapping[str, Any],
    make: Callable[[Photo], bytes],
    description: str,
) -> Outcome:
    """Write out/NAME.suffix for each picture that has none yet; one that is refused keeps no other from being made.

    Args:
        settings: what the results depend on beside the pictures; they are kept in out/manifest.json.
        make: the content of a picture's file.
        description: of the bar that shows the progress.

    Raises:
        UserError: `out` holds results of other settings, or of other pictures of these names, or cannot be written.
    """
    files = {picture: out / f"{picture.name}{suffix}" for picture in photos}
    inputs = {file.name: picture.digest for picture, file in files.items()}
    claim_for(out / MANIFEST, settings, inputs, "choose another --out")
    missing = [picture for picture, file in files.items() if not file.is_file()]
    refused = []
    with progress(total=len(missing), desc=description, unit="picture", disable=not missing) as bar:
        for picture in missing:
            try:
                content = make(picture)
            except UserError as error:
                refused.append(f"{picture.path}: {error}")
                del files[picture]
                continue
            with atomic_write(files[picture]) as temporary:
                temporary.write_bytes(content)
            bar.update()
    return Outcome({picture.name: file for picture, file in files.items()}, refused)


def png(picture: Image.Image) -> bytes:
    """The content of a .png file."""
    file = io.BytesIO()
    picture.save(file, "png")
    return file.getvalue()
