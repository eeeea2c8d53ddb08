"""Packing: what goes in comes out, broken images are named, and a half-written set is never seen."""

from __future__ import annotations

import io
import json
import os
import runpy
import signal
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from improved_diffusion.data import open_image_set
from improved_diffusion.data.labelled_files import labelled_folder
from improved_diffusion.data.packing import new_directory, pack, pack_synthetic
from improved_diffusion.data.synthetic import CLASS_NAMES, draw
from improved_diffusion.errors import UserError


def png(pixels: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def noise(index: int, size: int = 16) -> np.ndarray:
    return np.random.default_rng(index).integers(0, 256, (size, size, 3), dtype=np.uint8)


def make_folder(root: Path, names: list[str], broken: tuple[str, ...] = ()) -> Path:
    """Image number i of `names` has the pixels noise(i)."""
    for i, name in enumerate(names):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(png(noise(i))[: 300 if name in broken else None])
    return root


def make_zip(folder: Path) -> Path:
    path = folder.with_suffix(".zip")
    with zipfile.ZipFile(path, "w") as archive:
        for file in sorted(folder.rglob("*.png"), reverse=True):
            archive.write(file, file.relative_to(folder))
    return path


@pytest.fixture
def run(forked, monkeypatch, capfd) -> Callable[..., tuple[int, str, str]]:
    """`python -m improved_diffusion.data ARGUMENTS` in this process: its exit status, output and errors."""

    def run(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["data", *map(str, arguments)])
        code = 0
        try:
            runpy.run_module("improved_diffusion.data", run_name="__main__")
        except SystemExit as stop:
            code = stop.code or 0
        return code, *capfd.readouterr()

    return run


def test_round_trip_and_equal_hash_of_folder_and_zip(tmp_path: Path):
    names = [f"{split}/{name}/{i}.png" for split in ("test", "train") for name in ("b 'q' é", "a") for i in range(2)]
    folder = make_folder(tmp_path / "set", names)
    sets = []
    for path in (folder, make_zip(folder)):
        out = tmp_path / f"packed-{path.name}"
        pack(labelled_folder(path), out, 16, workers=2)
        train, test = open_image_set(out), open_image_set(out / "test")
        assert (train.split, test.split) == ("train", "test")
        assert train.class_names == test.class_names == ("a", "b 'q' é")
        np.testing.assert_array_equal(train.images, np.stack([noise(i) for i in (6, 7, 4, 5)]))
        np.testing.assert_array_equal(test.images, np.stack([noise(i) for i in (2, 3, 0, 1)]))
        np.testing.assert_array_equal(train.labels, [0, 0, 1, 1])
        assert train.labels.dtype == np.int64
        assert train.images.shape[1:] == (16, 16, 3)
        assert isinstance(train.images, np.memmap)
        sets.append((train.content_hash, test.content_hash))
    assert sets[0] == sets[1]
    assert sets[0][0] != sets[0][1]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["packed-set", "packed-set.zip", "set", "set.zip"]


def test_crops_of_what_is_trained_on(run, tmp_path: Path):
    """The centre, and others that a hash of the name decides, each a part of its image; val is cut once."""
    rows = np.linspace(0, 255, 40).astype(np.uint8)
    ramp = np.stack(np.broadcast_arrays(rows[:, None], rows, np.uint8(7)), axis=-1)  # a pixel says where it is
    for name in ("train/a/0.png", "train/a/1.png", "train/b/0.png", "val/a/2.png"):
        (tmp_path / "in" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "in" / name).write_bytes(png(ramp))
    for crops in (1, 4):
        code, _, errors = run(
            "folder", tmp_path / "in", "--out", tmp_path / str(crops), "--image-size", 20, "--crops", crops
        )
        assert code == 0, errors
    once, often = (open_image_set(tmp_path / name) for name in ("1", "4"))
    assert often.labels.tolist() == [0] * 8 + [1] * 4
    np.testing.assert_array_equal(often.images[::4], once.images)
    np.testing.assert_array_equal(open_image_set(tmp_path / "4/val").images, open_image_set(tmp_path / "1/val").images)
    assert len({image.tobytes() for image in often.images}) == 1 + 3 * 3
    for image in often.images.astype(int):
        down, across = (image[-1, 10, 0] - image[0, 10, 0]), (image[10, -1, 1] - image[10, 0, 1])
        assert abs(down - across) <= 4  # square
        assert 0.65 * 240 < down < 255
    code, _, errors = run("folder", tmp_path / "in", "--out", tmp_path / "0", "--crops", 0)
    assert "at least 1" in errors


def test_crops_of_files_whose_names_are_no_utf8(run, tmp_path: Path):
    try:
        make_folder(tmp_path / "in", [os.fsdecode(b"a/caf\xe9.png"), "b/1.png"])
    except OSError:
        pytest.skip("the file system takes UTF-8 names only")
    code, _, errors = run("folder", tmp_path / "in", "--out", tmp_path / "out", "--crops", 2, "--image-size", 8)
    assert code == 0, errors
    assert len(open_image_set(tmp_path / "out")) == 4


def test_broken_images_are_named_and_left_out(forked, tmp_path: Path):
    names = [f"a/{i:03}.png" for i in range(300)]  # three chunks
    broken = ("a/000.png", "a/128.png", "a/200.png", "a/299.png")
    (packed,) = pack(labelled_folder(make_folder(tmp_path / "set", names, broken)), tmp_path / "out", 16)
    assert [name for name, _ in packed.broken] == list(broken)
    assert packed.num_images == 296
    kept = [i for i, name in enumerate(names) if name not in broken]
    np.testing.assert_array_equal(open_image_set(tmp_path / "out").images, np.stack([noise(i) for i in kept]))
    description = json.loads((tmp_path / "out" / "dataset.json").read_text())
    assert [entry["image"] for entry in description["broken"]] == list(broken)
    assert all("truncated" in entry["reason"] for entry in description["broken"])


def test_a_split_of_which_no_image_can_be_read_is_an_error(forked, tmp_path: Path):
    names = [f"train/a/{i:02}.png" for i in range(99)] + ["val/a/0.png"]  # less than 2% of both
    files = labelled_folder(make_folder(tmp_path / "set", names, ("val/a/0.png",)))
    with pytest.raises(UserError, match=r"no image of val can be read; of val/a/0.png: .*truncated"):
        pack(files, tmp_path / "out", 16)
    assert not (tmp_path / "out").exists()


def test_more_than_two_percent_broken_is_an_error(forked, tmp_path: Path):
    names = [f"a/{i:02}.png" for i in range(50)]
    pack(labelled_folder(make_folder(tmp_path / "one", names, ("a/07.png",))), tmp_path / "out", 16)  # exactly 2%
    files = labelled_folder(make_folder(tmp_path / "two", names, ("a/07.png", "a/31.png")))
    with pytest.raises(UserError, match=r"2 of the first 50 images .* For one, 'a/07.png': .*truncated"):
        pack(files, tmp_path / "never", 16)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["one", "out", "two"]


def test_result_does_not_depend_on_the_number_of_workers(forked, tmp_path: Path):
    files = labelled_folder(make_folder(tmp_path / "set", [f"{i % 3}/{i}.png" for i in range(300)]))
    hashes = set()
    for workers in (1, 3):
        pack(files, tmp_path / str(workers), 16, workers=workers)
        hashes.add(open_image_set(tmp_path / str(workers)).content_hash)
    assert len(hashes) == 1


def test_existing_output(forked, tmp_path: Path):
    first = labelled_folder(make_folder(tmp_path / "first", ["a/1.png"]))
    second = labelled_folder(make_folder(tmp_path / "second", ["a/1.png", "a/2.png"]))
    out = tmp_path / "out"
    out.mkdir()
    pack(first, out, 16)  # an empty folder is no obstacle
    with pytest.raises(UserError, match="give --overwrite"):
        pack(second, out, 16)
    pack(second, out, 16, overwrite=True)
    assert len(open_image_set(out).images) == 2
    (tmp_path / "diary").mkdir()
    (tmp_path / "diary" / "page.txt").write_text("dear")
    with pytest.raises(UserError, match="not a packed image set"):
        pack(second, tmp_path / "diary", 16, overwrite=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["diary", "first", "out", "second"]


def test_failure_keeps_the_set_that_was_there(forked, tmp_path: Path):
    names = ["a/1.png", "a/2.png"]
    out = tmp_path / "out"
    pack(labelled_folder(make_folder(tmp_path / "set", names)), out, 16)
    before = open_image_set(out).content_hash
    with pytest.raises(UserError, match="broken"):
        pack(labelled_folder(make_folder(tmp_path / "bad", names, ("a/1.png",))), out, 16, overwrite=True)
    assert open_image_set(out).content_hash == before


def children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


def first_row_is_there(file: Path) -> bool:
    try:
        return bool(np.load(file, mmap_mode="r")[0].any())
    except (FileNotFoundError, EOFError, ValueError):  # the file is being made
        return False


@pytest.fixture(scope="module")
def slow(tmp_path_factory) -> Path:
    """A folder that takes a minute to decode."""
    folder = tmp_path_factory.mktemp("slow")
    (folder / "a").mkdir()
    (folder / "a" / "0.png").write_bytes(png(noise(0, 2000)))
    for i in range(1, 600):
        os.link(folder / "a" / "0.png", folder / "a" / f"{i}.png")
    return folder


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="finds the worker processes in Linux's /proc")
@pytest.mark.parametrize("victim", ["parent", "worker", "ctrl-c"])
def test_killed_while_packing(forked, slow: Path, tmp_path: Path, victim: str):
    """Nothing at OUT, no process left, and the next run succeeds."""
    out = tmp_path / "out"
    command = [sys.executable, "-m", "improved_diffusion.data", "folder", slow, "--out", out]
    process = subprocess.Popen(
        [*map(str, command), "--workers", "2"], stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    images = tmp_path / ".out.partial" / "images.npy"
    deadline = time.monotonic() + 60
    while not first_row_is_there(images):
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.02)
    workers = children(process.pid)
    if victim == "parent":
        process.kill()
    elif victim == "worker":
        decoder = next(pid for pid in workers if "spawn_main" in Path(f"/proc/{pid}/cmdline").read_text())
        os.kill(decoder, signal.SIGKILL)
    else:
        os.killpg(process.pid, signal.SIGINT)
    _, stderr = process.communicate(timeout=60)
    message = stderr.splitlines()[-1]
    assert process.returncode == {"parent": -signal.SIGKILL, "worker": 2, "ctrl-c": 130}[victim]
    assert message == "interrupted" if victim == "ctrl-c" else "Traceback" not in stderr
    assert victim != "worker" or "error: a worker process died" in message
    assert not out.exists()
    assert (tmp_path / ".out.partial").exists() == (victim == "parent")

    while any(is_running(pid) for pid in workers):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    pack(labelled_folder(make_folder(tmp_path / "quick", ["a/1.png"])), out, 16)
    assert len(open_image_set(out).images) == 1
    assert not (tmp_path / ".out.partial").exists()


def test_two_writers_of_one_set(tmp_path: Path):
    files = labelled_folder(make_folder(tmp_path / "set", ["a/1.png"]))
    with new_directory(tmp_path / "out", overwrite=False), pytest.raises(UserError, match="another process"):
        pack(files, tmp_path / "out", 16)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "set"]


# ----------------------------------------------------------------------------------------------------------------------
# Command line


def test_command_line_reports_what_it_did(run, tmp_path: Path):
    names = [f"train/a/{i}.png" for i in range(60)] + ["test/b/0.png", "test/b/notes.txt"]
    make_folder(tmp_path / "set", names, ("train/a/7.png",))
    arguments = ("--image-size", 8, "--validation-per-class", 0)
    code, out, err = run("folder", tmp_path / "set", "--out", tmp_path / "out", *arguments)
    assert code == 0, err
    assert "packed 60 images" in out
    assert "train: 59 images, 1 classes (no image of 1 others: 'b')" in out
    assert "'train/a/7.png': " in out
    assert "skipped 1 files that are no images: 1 .txt" in out
    assert open_image_set(tmp_path / "out").images.shape[1:] == (8, 8, 3)


def test_command_line_takes_a_validation_split_out_of_train(run, tmp_path: Path):
    names = [f"train/{name}/{i}.png" for name in "ab" for i in range(60)] + ["test/a/0.png"]
    broken = ("train/a/7.png", "train/b/31.png")  # 2 of 120, wherever they end
    make_folder(tmp_path / "set", names, broken)
    code, out, err = run("folder", tmp_path / "set", "--out", tmp_path / "out", "--image-size", 16)
    assert code == 0, err
    train, val, test = (open_image_set(tmp_path / "out" / split) for split in ("", "val", "test"))
    assert (train.split, val.split, test.split) == ("train", "val", "test")
    assert len(train.images) + len(val.images) == 118
    assert len(test.images) == 1
    packed = {image.tobytes() for image in (*train.images, *val.images)}
    assert packed == {noise(i).tobytes() for i, name in enumerate(names[:120]) if name not in broken}
    # A fifth of 60 is less than 20.
    (line,) = (line for line in out.splitlines() if "taken out of train" in line)
    assert "24 images" in line
    assert "a fifth" in line


def test_food101_with_its_official_splits(run, tmp_path: Path):
    images, meta = tmp_path / "food-101" / "images", tmp_path / "food-101" / "meta"
    make_folder(images, ["waffles/1.jpg", "waffles/2.jpg", "apple_pie/3.jpg"])  # PNG inside: the content decides
    meta.mkdir()
    (meta / "train.json").write_text(json.dumps({"waffles": ["waffles/2"], "apple_pie": ["apple_pie/3"]}))
    (meta / "test.json").write_text(json.dumps({"waffles": ["waffles/1"], "apple_pie": []}))
    code, out, err = run("food101", "--source", tmp_path, "--out", tmp_path / "out", "--image-size", 16)
    assert code == 0, err
    train, test = open_image_set(tmp_path / "out"), open_image_set(tmp_path / "out" / "test")
    assert train.class_names == test.class_names == ("apple_pie", "waffles")
    np.testing.assert_array_equal(train.images, np.stack([noise(2), noise(1)]))
    np.testing.assert_array_equal(train.labels, [0, 1])
    np.testing.assert_array_equal(test.images[0], noise(0))
    np.testing.assert_array_equal(test.labels, [1])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["folder", "{tmp}/missing", "--out", "{tmp}/out"], "there is no folder or zip archive at"),
        (["folder", "{tmp}/set"], "the following arguments are required: --out"),
        (["folder", "{tmp}/set", "--out", "{tmp}/out", "--image-size", "0"], "must be at least 1"),
        (["folder", "{tmp}/set", "--out", "{tmp}/set"], "not a packed image set"),
        (["folder", "{tmp}/set", "--out", "{tmp}/set/a/1.png/out"], "could not write"),
        (["food101", "--source", "{tmp}/set", "--out", "{tmp}/out"], "no usable food-101/"),
        (["folder", "{tmp}/set", "--out", "/proc"], "is a mount point"),
        (["folder", "{tmp}/" + 300 * "x", "--out", "{tmp}/out"], "File name too long"),
        (["shard", "{tmp}/set", "--out", "{tmp}/set/a/1.png/out"], "File exists"),
        (["sorcery"], "invalid choice: 'sorcery'"),
    ],
)
def test_command_line_errors_are_one_line(run, tmp_path: Path, arguments: list[str], message: str):
    make_folder(tmp_path / "set", ["a/1.png"])
    code, out, err = run(*(argument.format(tmp=tmp_path) for argument in arguments))
    assert code == 2
    assert out == ""
    assert message in err
    assert len(err.splitlines()) == 1
    assert err.startswith("error: ")


def test_synthetic_set(tmp_path: Path):
    pack_synthetic(tmp_path / "out", per_class=2, test_per_class=1, seed=3, validation_per_class=1)
    train, val, test = (open_image_set(tmp_path / "out" / split) for split in ("", "val", "test"))
    assert list(train.class_names) == sorted(CLASS_NAMES)
    assert train.class_names == test.class_names
    np.testing.assert_array_equal(np.bincount(train.labels), [2] * len(CLASS_NAMES))
    np.testing.assert_array_equal(np.bincount(test.labels), [1] * len(CLASS_NAMES))
    row = int(np.flatnonzero(test.labels == 1)[0])
    np.testing.assert_array_equal(test.images[row], draw(3, test.class_names[1], 1_000_000))
    np.testing.assert_array_equal(val.images[row], draw(3, val.class_names[1], 2_000_000))
