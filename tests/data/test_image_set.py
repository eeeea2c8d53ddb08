"""Opening a packed set: whole, as it was written, or refused in a line that says what is wrong with it."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from improved_diffusion.data import open_image_set
from improved_diffusion.data.labelled_files import labelled_folder
from improved_diffusion.data.packing import pack
from improved_diffusion.errors import UserError


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    """A folder of two images, `set`, and the set that it is packed to."""
    place = tmp_path_factory.mktemp("whole")
    for number, name in enumerate(("a/1.png", "b/2.png")):
        (place / "set" / name).parent.mkdir(parents=True)
        pixels = np.random.default_rng(number).integers(0, 256, (16, 16, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(place / "set" / name)
    pack(labelled_folder(place / "set"), place / "packed", 16, workers=1)
    return place / "packed"


@pytest.fixture
def packed(whole: Path, tmp_path: Path) -> Path:
    """A copy, to be spoilt."""
    shutil.copytree(whole.parent, tmp_path, dirs_exist_ok=True)
    return tmp_path / "packed"


def edit_json(packed: Path, **changes: object) -> None:
    description = json.loads((packed / "dataset.json").read_text())
    (packed / "dataset.json").write_text(json.dumps({**description, **changes}))


def flip_a_bit(packed: Path) -> None:
    images = np.load(packed / "images.npy", mmap_mode="r+")
    images[1, 2, 3, 0] ^= 1
    images.flush()


def put_an_npz(packed: Path) -> None:
    with (packed / "images.npy").open("wb") as file:
        np.savez(file, images=np.zeros(1))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (flip_a_bit, r"images.npy does not match its SHA-256"),
        (lambda p: np.save(p / "labels.npy", np.array([1, 0])), "labels.npy does not match its SHA-256"),
        (lambda p: np.save(p / "labels.npy", np.array([0, 2])), "labels from 0 to 2, but dataset.json names 2 classes"),
        (lambda p: np.save(p / "labels.npy", np.array([0])), r"labels.npy is int64 \(1,\); expected int64 \(2,\)"),
        (lambda p: np.save(p / "images.npy", np.zeros((2, 16, 8, 3))), r"expected uint8 \(N, H, W, C\)"),
        (lambda p: os.truncate(p / "images.npy", 500), "cannot read .*images.npy"),
        (lambda p: os.truncate(p / "images.npy", 0), "cannot read .*images.npy"),
        (put_an_npz, "images.npy is an .npz of another name"),
        (lambda p: (p / "labels.npy").unlink(), "labels.npy is missing"),
        (lambda p: (p / "dataset.json").unlink(), "dataset.json is missing"),
        (lambda p: os.truncate(p / "dataset.json", 40), "cannot read .*dataset.json"),
        (lambda p: edit_json(p, class_names=["a", "c"]), "class names do not match"),
        (lambda p: edit_json(p, class_names="ab"), "`class_names` is missing or no list"),
        (lambda p: edit_json(p, format_version=2), "format version 1"),
    ],
)
def test_damaged_set(packed: Path, damage, message: str):
    damage(packed)
    with pytest.raises(UserError, match=message) as caught:
        open_image_set(packed)
    assert "\n" not in str(caught.value)


def test_not_a_packed_set(packed: Path):
    folder, archive = packed.parent / "set", packed.parent / "set.zip"
    with zipfile.ZipFile(archive, "w") as file:
        file.write(folder / "a" / "1.png", "a/1.png")
    for path, message in [
        (packed.parent / "missing", "no packed image set at .* synthetic --out"),
        (archive, "is a zip archive, not a packed image set"),
        (folder / "a" / "1.png", "is a file, not a packed image set"),
        (folder, "is a folder without dataset.json"),
    ]:
        with pytest.raises(UserError, match=message):
            open_image_set(path)


def test_arrays_are_read_only(whole: Path):
    image_set = open_image_set(whole)
    with pytest.raises(ValueError, match="read-only"):
        image_set.images[0] = 0
    with pytest.raises(ValueError, match="read-only"):
        image_set.labels[0] = 1


def test_opening_does_not_import_torch(whole: Path):
    code = "import sys; from improved_diffusion.data import open_image_set; open_image_set(sys.argv[1]); "
    code += "assert 'torch' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", code, str(whole)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
