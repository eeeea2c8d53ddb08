"""Icon sets of npm: rendered with their alpha, named by what they show, and told apart from their variants."""

from __future__ import annotations

import io
import json
import sys
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from improved_diffusion.data.__main__ import main
from improved_diffusion.data.icons import open_icons
from improved_diffusion.errors import UserError

CIRCLE = '<circle cx="8" cy="8" r="4" fill="red"/>'
FILES = {
    "icons.json": {
        "prefix": "toy-emoji",
        "width": 16,
        "height": 16,
        "icons": {
            "red-circle": {"body": CIRCLE},
            "woman-artist-dark-skin-tone": {"body": '<rect width="16" height="8" fill="#00f"/>', "height": 8},
            "broken": {"body": "<circle"},
            "old-name": {"body": CIRCLE, "hidden": True},
        },
    },
    "metadata.json": {"categories": {"Shapes & Such": ["red-circle"]}},
    "info.json": {"name": "Toy", "license": {"title": "MIT", "spdx": "MIT"}},
    "package.json": {"version": "1.2.3"},
}


@pytest.fixture
def package(tmp_path) -> Path:
    with tarfile.open(tmp_path / "toy.tgz", "w:gz") as archive:
        for name, content in FILES.items():
            data = json.dumps(content).encode()
            member = tarfile.TarInfo(f"package/{name}")
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    return tmp_path / "toy.tgz"


def write(monkeypatch, package: Path, out: Path) -> zipfile.ZipFile:
    monkeypatch.setattr(sys, "argv", ["data", "icons", str(package), "--out", str(out), "--image-size", "32"])
    main()
    return zipfile.ZipFile(out)


def test_icons_are_rendered_and_captioned(package, tmp_path, monkeypatch, capsys):
    archive = write(monkeypatch, package, tmp_path / "a.zip")
    rows = [json.loads(line) for line in archive.read("metadata.jsonl").splitlines()]
    assert rows == [
        {
            "file_name": "shapes_such/red-circle.png",
            "text": "toy sticker of red circle",
            "name": "red circle",
            "base": "red-circle",
            "style": "toy",
        },
        {
            "file_name": "other/woman-artist-dark-skin-tone.png",
            "text": "toy sticker of woman artist dark skin tone",
            "name": "woman artist dark skin tone",
            "base": "artist",
            "style": "toy",
        },
    ]
    circle, wide = (np.array(Image.open(io.BytesIO(archive.read(row["file_name"])))) for row in rows)
    assert circle.shape == (32, 32, 4)
    assert circle[0, 0, 3] == 0
    assert circle[16, 16].tolist() == [255, 0, 0, 255]
    assert wide[[2, 16, 30], 16, 3].tolist() == [0, 255, 0]  # in the middle of its square
    source = json.loads(archive.read("source.json"))
    assert (source["license"]["spdx"], source["version"]) == ("MIT", "1.2.3")
    said = capsys.readouterr().out
    assert "under the licence MIT" in said
    assert "left out: broken" in said


def test_an_unpacked_package_makes_the_same_bytes(package, tmp_path, monkeypatch):
    with tarfile.open(package) as archive:
        archive.extractall(tmp_path, filter="data")
    for source in (package, tmp_path / "package", tmp_path / "package" / "icons.json"):
        write(monkeypatch, source, tmp_path / f"{source.name}.zip")
    first, second, third = (path.read_bytes() for path in sorted(tmp_path.glob("*.zip")))
    assert first == second == third
    with pytest.raises(UserError, match="exists already"):
        write(monkeypatch, package, tmp_path / "toy.tgz.zip")


NOT_AS_NPMS = [
    b"{}",
    b'{"icons": {"a": {"body": "<g/>"}}}',
    b'{"prefix": "toy", "icons": {"a": {}}}',
    b'{"prefix": "toy", "icons": {"a": {"body": "<g/>", "hidden": true}}}',
]


@pytest.mark.parametrize("content", [None, b"no package", *NOT_AS_NPMS])
def test_what_is_no_icon_set_is_said_with_what_to_do(tmp_path, content):
    path = tmp_path / ("icons.json" if content in NOT_AS_NPMS else "noto.tgz")
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError, match="npm pack @iconify-json/noto"):
        open_icons(path)


def test_variants_of_tone_and_gender_share_a_base(tmp_path):
    tones = ("light", "medium-light", "medium", "medium-dark", "dark")
    bases = {
        **{"police-car": "police-car", "police-car-light": "police-car-light", "boy": "boy"},
        **dict.fromkeys(("man", "man-medium-light-skin-tone"), "man"),
        **dict.fromkeys(("cook", "woman-cook", *(f"woman-cook-{tone}" for tone in tones)), "cook"),
        "couple-with-heart-woman-man-dark-skin-tone-light-skin-tone": "couple-with-heart",
        **dict.fromkeys(("family-man-woman-boy", "family-woman-girl-girl"), "family"),
        **dict.fromkeys(("woman-running", "man-running-facing-right"), "running"),
    }
    (tmp_path / "icons.json").write_text(json.dumps({"prefix": "x", "icons": {n: {"body": CIRCLE} for n in bases}}))
    assert {icon.name: icon.base for icon in open_icons(tmp_path).icons} == bases
