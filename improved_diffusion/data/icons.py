"""Icon sets of Iconify's npm packages (`@iconify-json/noto` and the like), rendered: a zip of captioned RGBA pictures.

A package holds `icons.json`, the icons' SVG bodies by name; `metadata.json`, their categories; `info.json`, whose they
are and under which licence. The zip has a PNG for each icon in a folder of its category; `metadata.jsonl`, a line for
each picture; and `source.json`, what it was made of. The same package makes the same bytes.
"""

from __future__ import annotations

import json
import re
import tarfile
import zipfile
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from improved_diffusion.data.names import base_name
from improved_diffusion.errors import UserError
from improved_diffusion.files import atomic_write
from improved_diffusion.progress import progress

FILES = ("icons.json", "metadata.json", "info.json", "package.json")
GET = "an icon set comes by `npm pack @iconify-json/noto`: give the .tgz, or its unpacked folder"
TONES = ("light", "medium-light", "medium", "medium-dark", "dark")  # of skin
# What is no part of a base name, even of one that has no word beside: tones, and the children of a family.
EXTRA = re.compile(r"(?<=\w) (?:(?:medium )?(?:light|dark) skin tone|medium skin tone|boy|girl)\b")
DEFAULT_SIDE = 16  # of an icon, where Iconify's format leaves it out
UNCATEGORIZED = "other"
FIRST_DATE = (1980, 1, 1, 0, 0, 0)  # the earliest that a zip can say: a date of the day would change its bytes


@dataclass(frozen=True)
class Icon:
    """One icon."""

    name: str  # of the package: birthday-cake, artist-dark-skin-tone
    readable: str  # birthday cake, artist dark skin tone
    base: str  # birthday-cake, artist; shared by variants of tone and gender: a split by it does not leak
    category: str  # food_drink
    svg: str


@dataclass(frozen=True)
class IconSet:
    """The icons of a package, in order of their names; those that it hides, being old names, are left out."""

    prefix: str  # noto, fluent-emoji-flat
    info: dict[str, Any]  # title, author, license: of its info.json; empty where there is none
    version: str | None
    icons: tuple[Icon, ...]

    @property
    def style(self) -> str:
        """What its captions call it: the first word of its prefix."""
        return self.prefix.split("-")[0]

    @property
    def licence(self) -> str:
        named = self.info.get("license") or {}
        return named if isinstance(named, str) else named.get("spdx") or named.get("title") or "unknown"


def open_icons(path: Path | str) -> IconSet:
    """The icon set in an npm package: its .tgz, its unpacked folder, or icons.json in that.

    Raises:
        UserError: no such thing, or one without icons.
    """
    path = Path(path)
    read = _tarball if path.is_file() and path.suffix != ".json" else _folder
    try:
        files = {name: json.loads(content) for name, content in read(path).items()}
    except (OSError, tarfile.TarError, ValueError) as error:
        raise UserError(f"cannot read the icon set {path}: {error}; {GET}") from error
    if not isinstance(found := files.get("icons.json"), dict) or not found.get("icons"):
        raise UserError(f"there is no icon set at {path}: {GET}")
    try:
        categories = files.get("metadata.json", {}).get("categories", {})
        category_of = {name: _folder_name(category) for category, names in categories.items() for name in names}
        shown = {name: icon for name, icon in found["icons"].items() if not icon.get("hidden")}
        icons = tuple(_icon(name, shown, category_of.get(name, UNCATEGORIZED), found) for name in sorted(shown))
        icon_set = IconSet(
            found["prefix"], files.get("info.json", {}), files.get("package.json", {}).get("version"), icons
        )
    except (LookupError, TypeError, AttributeError) as error:
        raise UserError(f"the icon set {path} is not as those of npm are ({error!r}); {GET}") from error
    if not icons:
        raise UserError(f"the icon set {path} hides all its icons; {GET}")
    return icon_set


def _icon(name: str, shown: dict[str, dict[str, Any]], category: str, found: dict[str, Any]) -> Icon:
    readable = _with_tone(name, shown).replace("-", " ")
    base = base_name(EXTRA.sub("", readable)).replace(" ", "-")
    return Icon(name, readable, base, category, _svg({**found, **shown[name]}))


def render(svg: str, size: int) -> bytes:
    """An SVG as a PNG, RGBA, `size` pixels a side.

    Raises:
        UserError: resvg-py is not installed.
        ValueError: it cannot be rendered.
    """
    try:
        import resvg_py
    except ImportError as error:
        raise UserError("icons are rendered by resvg-py: in the checkout, pip install -e '.[stickers]'") from error
    return bytes(resvg_py.svg_to_bytes(svg_string=svg, width=size, height=size, skip_system_fonts=True))


def write_icons(icons: IconSet, out: Path, size: int, style: str | None = None) -> tuple[int, tuple[str, ...]]:
    """Render a set into the zip `out`, and return how many pictures that holds, and what was left out and why.

    A line of its `metadata.jsonl`: {"file_name": "food_drink/birthday-cake.png", "text": "noto sticker of birthday
    cake", "name": "birthday cake", "base": "birthday-cake", "style": "noto"}.

    Args:
        icons: what is rendered.
        out: a zip file.
        size: pixels a side.
        style: what captions call the set, in place of its own word.

    Raises:
        UserError: the file cannot be written; nothing could be rendered.
    """
    style = style or icons.style
    lines, skipped = [], []
    with atomic_write(out) as temporary, zipfile.ZipFile(temporary, "w") as archive:
        for icon in progress(iterable=icons.icons, desc=f"rendering {icons.prefix}", unit="icon"):
            try:
                picture = render(icon.svg, size)
            except ValueError as error:
                skipped.append(f"{icon.name}: {error}")
                continue
            file_name = f"{icon.category}/{icon.name}.png"
            _add(archive, file_name, picture)
            text = f"{style} sticker of {icon.readable}"
            lines.append(
                {"file_name": file_name, "text": text, "name": icon.readable, "base": icon.base, "style": style}
            )
        if not lines:
            raise UserError(f"no icon of {icons.prefix} can be rendered; the first is {skipped[0]}")
        _add(archive, "metadata.jsonl", "".join(json.dumps(line) + "\n" for line in lines).encode())
        package = {"package": f"@iconify-json/{icons.prefix}", "version": icons.version, "image_size": size}
        _add(archive, "source.json", json.dumps({**package, **icons.info}, indent=1).encode())
    return len(lines), tuple(skipped)


def _add(archive: zipfile.ZipFile, name: str, content: bytes) -> None:
    archive.writestr(zipfile.ZipInfo(name, FIRST_DATE), content)


def _with_tone(name: str, names: Collection[str]) -> str:
    """The name with fluent-emoji's tones spelt out. No more than `-dark` says them there; companions among the `names`
    tell that from the end of another word, as in `police-car-light`."""
    for tone in TONES:
        stem = name.removesuffix(f"-{tone}")
        if stem != name and all(f"{stem}-{other}" in names for other in TONES):
            return f"{name}-skin-tone"
    return name


def _svg(icon: dict[str, Any]) -> str:
    left, top = icon.get("left", 0), icon.get("top", 0)
    width, height = icon.get("width", DEFAULT_SIDE), icon.get("height", DEFAULT_SIDE)
    side = max(width, height)  # what is not square is in the middle of a square
    corner = f"{left - (side - width) / 2:g} {top - (side - height) / 2:g}"
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" width="{side:g}" '
        f'height="{side:g}" viewBox="{corner} {side:g} {side:g}">{icon["body"]}</svg>'
    )


def _folder_name(category: str) -> str:
    """`Food & Drink` as a folder: food_drink."""
    return "_".join(re.findall(r"[a-z0-9]+", category.lower())) or UNCATEGORIZED


def _tarball(path: Path) -> dict[str, bytes]:
    with tarfile.open(path) as archive:
        members = {member.name.removeprefix("package/"): member for member in archive.getmembers() if member.isfile()}
        return {name: archive.extractfile(members[name]).read() for name in FILES if name in members}


def _folder(path: Path) -> dict[str, bytes]:
    folder = path if path.is_dir() else path.parent
    return {name: (folder / name).read_bytes() for name in FILES if (folder / name).is_file()}
