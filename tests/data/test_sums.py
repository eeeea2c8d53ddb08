"""A packed set is read whole once, and again when its file is another; `verify` always reads."""

from __future__ import annotations

import os
import shutil
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from improved_diffusion.data import open_image_set, sums
from improved_diffusion.errors import UserError
from improved_diffusion.metrics.images.opening import open_source


@pytest.fixture
def packed(tiny_set, tmp_path, monkeypatch) -> Path:
    """A packed set that was written a minute ago, with a test split."""
    monkeypatch.setenv("IMPROVED_DIFFUSION_CACHE", str(tmp_path / "cache"))
    shutil.copytree(tiny_set, tmp_path / "set")
    for file in (tmp_path / "set").rglob("images.npy"):
        set_age(file, 60)
    return tmp_path / "set"


@pytest.fixture
def summed(monkeypatch) -> list[int]:
    """The lengths of the arrays that are summed up."""
    lengths, array_sha256 = [], sums.array_sha256

    def counted(array: np.ndarray) -> str:
        lengths.append(len(array))
        time.sleep(0.05)
        return array_sha256(array)

    monkeypatch.setattr(sums, "array_sha256", counted)
    return lengths


def set_age(file: Path, seconds: float) -> None:
    then = time.time_ns() - int(seconds * 1e9)
    os.utime(file, ns=(then, then))


def flip_a_bit(packed: Path) -> None:
    with (packed / "images.npy").open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        (last,) = file.read(1)
        file.seek(-1, os.SEEK_END)
        file.write(bytes([last ^ 1]))


def test_a_set_is_read_whole_once(packed, summed):
    first = open_image_set(packed)
    assert len(summed) == 1
    again = open_image_set(packed)
    assert again.content_hash == first.content_hash
    assert open_source(packed).content_hash  # nor is it for measuring
    assert len(summed) == 1
    open_image_set(packed / "test")
    assert len(summed) == 2


def test_processes_that_open_it_at_once_wait_for_the_first(packed, summed):
    with ThreadPoolExecutor(4) as pool:
        hashes = set(pool.map(lambda _: open_image_set(packed).content_hash, range(4)))
    assert len(hashes) == 1
    assert len(summed) == 1
    assert not list(packed.parent.rglob("*.lock"))


def test_a_set_that_is_read_only_is_read_once_too(packed, summed):
    files = sorted(packed.rglob("*"))
    for file in files:
        file.chmod(0o555 if file.is_dir() else 0o444)
    packed.chmod(0o555)
    open_image_set(packed)
    open_image_set(packed)
    assert len(summed) == 1
    assert sorted(packed.rglob("*")) == files


def test_a_changed_file_is_noticed_even_with_the_old_time_and_size(packed):
    open_image_set(packed)
    file = packed / "images.npy"
    before = file.stat()
    flip_a_bit(packed)
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert (file.stat().st_size, file.stat().st_mtime_ns) == (before.st_size, before.st_mtime_ns)
    with pytest.raises(UserError, match="images.npy does not match its SHA-256"):
        open_image_set(packed)


def test_another_set_at_the_same_place_is_read(packed, summed):
    open_image_set(packed)
    (packed / "images.npy").write_bytes((packed / "test" / "images.npy").read_bytes())
    set_age(packed / "images.npy", 60)
    with pytest.raises(UserError, match="images.npy does not match its SHA-256"):
        open_image_set(packed)
    assert len(summed) == 2


def test_of_a_file_that_was_written_this_moment_nothing_is_kept(packed, summed):
    set_age(packed / "images.npy", 0)  # it may yet change within one tick of the clock
    open_image_set(packed)
    open_image_set(packed)
    assert len(summed) == 2


def test_where_nothing_can_be_kept_the_set_is_read_each_time(packed, summed, monkeypatch, tmp_path):
    (tmp_path / "file").write_text("no folder")
    monkeypatch.setenv("IMPROVED_DIFFUSION_CACHE", str(tmp_path / "file"))
    open_image_set(packed)
    open_image_set(packed)
    assert len(summed) == 2


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"sha256": 1', "null"])
def test_a_damaged_record_is_not_believed(packed, summed, text):
    open_image_set(packed)
    (record,) = (packed.parent / "cache" / "sums").iterdir()
    record.write_text(text)
    open_image_set(packed)
    assert len(summed) == 2


class TestVerify:
    """What no file system tells."""

    @pytest.fixture
    def rotten(self, packed, monkeypatch):
        open_image_set(packed)
        open_image_set(packed / "test")
        known = {file: sums._state(file) for file in packed.rglob("images.npy")}
        monkeypatch.setattr(sums, "_state", lambda file: known[file])
        flip_a_bit(packed / "test")
        return packed

    def test_finds_it_and_it_stays_found(self, rotten):
        open_image_set(rotten / "test")
        for verify in (True, False):
            with pytest.raises(UserError, match="images.npy does not match its SHA-256"):
                open_image_set(rotten / "test", verify=verify)

    def test_command_names_each_set(self, packed, run_script, summed):
        open_image_set(packed)
        outcome = run_script("improved_diffusion/data/__main__.py", "verify", packed)
        assert outcome.code == 0, outcome.err
        lines = [line.split(",")[0] for line in outcome.out.splitlines()]
        assert lines == [f"{packed}: 36 images", f"{packed}/test: 36 images"]
        assert len(summed) == 3

    def test_command_refuses_damage(self, rotten, run_script):
        outcome = run_script("improved_diffusion/data/__main__.py", "verify", rotten)
        assert outcome.is_one_clear_line(), outcome
        assert "test/images.npy" in outcome.err

    def test_command_refuses_what_is_no_set(self, tmp_path, run_script):
        assert run_script("improved_diffusion/data/__main__.py", "verify", tmp_path).is_one_clear_line()
