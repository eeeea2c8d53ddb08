"""Many images: each is drawn once, whole or not at all, in memory that does not grow with their number."""

from __future__ import annotations

import contextlib
import os
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from improved_diffusion.errors import UserError
from improved_diffusion.files import exclusive
from improved_diffusion.metrics.images.opening import open_source
from improved_diffusion.runtime.devices import Processes
from improved_diffusion.sampling import sample_folder, writing
from improved_diffusion.sampling.generate import SampleKey
from improved_diffusion.sampling.loading import load
from improved_diffusion.sampling.model import Model, change_sampling

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def model(tiny_run) -> Model:
    return load(tiny_run, device="cpu")


@pytest.fixture
def write(model, tmp_path):
    sampling = change_sampling(model.config.sampling, sampler="ddim", steps=2, batch_size=4)

    def run(n: int, out: str = "out", with_npz: bool = True):
        keys = model.keys(None, n, seed=0)
        return writing.write_samples(
            model, keys, sampling, tmp_path / out, Processes(CPU), with_npz=with_npz, overwrite=False
        )

    return run


@pytest.fixture
def drawn(monkeypatch) -> list:
    """The keys of all images that are drawn."""
    keys = []
    draw = Model.draw

    def recorded(self, share, sampling, **options):
        keys.extend(share)
        return draw(self, share, sampling, **options)

    monkeypatch.setattr(Model, "draw", recorded)
    return keys


def arrays(folder) -> dict[str, np.ndarray]:
    with np.load(folder / "samples.npz") as loaded:
        return {name: loaded[name] for name in loaded.files}


def stop_after(count: int, monkeypatch) -> None:
    """Kill whoever writes image number `count`, in the middle of it."""
    save, written = writing.save_png, []

    def save_or_stop(image, path, **options):
        written.append(path)
        if len(written) > count:
            (path.parent / f".{path.name}.x.tmp").write_bytes(b"\x89PNG half")
            raise KeyboardInterrupt
        save(image, path, **options)

    monkeypatch.setattr(writing, "save_png", save_or_stop)


def test_the_array_is_of_the_images_in_the_folder(write, model):
    found = arrays(write(3))
    assert found["labels"].tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2]
    files = [sample_folder.sample_file(0, name, number) for name in model.class_names for number in range(3)]
    images = [np.asarray(Image.open(write(3, with_npz=False) / file)) for file in files]
    np.testing.assert_array_equal(found["arr_0"], images)


def test_a_killed_command_goes_on(write, drawn, monkeypatch):
    whole = arrays(write(3, "undisturbed"))
    drawn.clear()
    with monkeypatch.context() as patch:
        stop_after(5, patch)
        with pytest.raises(KeyboardInterrupt):
            write(3)
    drawn.clear()
    folder = write(3)
    assert len(drawn) == 4
    resumed = arrays(folder)
    assert np.abs(resumed["arr_0"].astype(int) - whole["arr_0"].astype(int)).max() <= 1  # batches are others
    assert len(list(folder.rglob("*.png"))) == 9
    assert not list(folder.rglob(".*"))  # nothing half-written stays


def test_an_image_that_a_crash_cut_short_is_drawn_again(write, drawn):
    folder = write(2)
    before = arrays(folder)
    short, empty = folder / "waffles" / "seed0_000001.png", folder / "apple_pie" / "seed0_000000.png"
    os.truncate(short, short.stat().st_size // 2)
    os.truncate(empty, 0)
    drawn.clear()
    write(2)
    assert [(key.class_index, key.number) for key in drawn] == [(0, 0), (2, 1)]
    assert np.abs(arrays(folder)["arr_0"].astype(int) - before["arr_0"].astype(int)).max() <= 1


def test_images_that_other_code_drew_are_not_kept(write, drawn, monkeypatch):
    write(2)
    drawn.clear()
    monkeypatch.setattr(sample_folder, "generating_code_hash", lambda: "a new sampler")
    folder = write(2)
    assert len(drawn) == 6
    assert sample_folder.read_manifest(folder)["generating_code"] == "a new sampler"


def test_images_are_not_synced_one_by_one(write, monkeypatch):
    synced = []
    monkeypatch.setattr(os, "fsync", synced.append)
    write(1, "few")
    few = len(synced)
    write(8, "many")
    assert len(synced) == 2 * few


def test_memory_does_not_grow_with_the_images(write, model, monkeypatch):
    image = np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8)

    def draw(self, keys, sampling, **options):
        for first in range(0, len(keys), 4):
            yield keys[first : first + 4], np.stack([image] * len(keys[first : first + 4]))

    monkeypatch.setattr(Model, "draw", draw)

    def peak(n: int) -> int:
        tracemalloc.start()
        write(n, str(n))
        size = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return size

    peak(1)
    assert (peak(400) - peak(20)) / (3 * 380) < image.nbytes  # the keys and their manifest, no image


def test_one_command_at_a_time_writes_a_folder(write, tmp_path):
    with contextlib.ExitStack() as held:
        held.enter_context(exclusive(tmp_path / ".out.lock", "the other"))
        with pytest.raises(UserError, match="another process is writing .*out at this moment"):
            write(1)
    assert (write(1) / "samples.npz").is_file()
    assert not (tmp_path / ".out.lock").exists()


def test_a_full_disk_is_one_line(write, monkeypatch):
    def full(file, shape):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(writing, "allocate", full)
    with pytest.raises(UserError, match="could not write .*No space left"):
        write(1)


def test_what_cannot_be_drawn_replaces_nothing(write, model, tmp_path):
    folder = write(2)
    before = {file: file.read_bytes() for file in folder.rglob("*.png")}
    for wrong in ({"sampler": "ancestral", "steps": 5000}, {"sampler": "ddim", "steps": 2, "noise": "philox"}):
        sampling, keys = change_sampling(model.config.sampling, **wrong), [SampleKey(2**64, 0, i) for i in range(2)]
        with pytest.raises(UserError):
            writing.write_samples(model, keys, sampling, folder, Processes(CPU), with_npz=False, overwrite=True)
    assert {file: file.read_bytes() for file in folder.rglob("*.png")} == before
    assert sample_folder.read_manifest(folder)["sampling_steps"] == 2


def test_into_the_folder_where_one_is(write, model, tmp_path, monkeypatch):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    keys = model.keys(None, 1, seed=0)
    sampling = change_sampling(model.config.sampling, sampler="ddim", steps=1)
    folder = writing.write_samples(model, keys, sampling, Path("."), Processes(CPU), with_npz=True, overwrite=False)
    assert folder == tmp_path / "here"
    assert open_source(folder / "samples.npz").class_names == model.class_names


def test_pictures_that_are_no_numbers_are_refused(tiny_run):
    """As uint8 they would be black."""
    broken = load(tiny_run, device="cpu")
    with torch.no_grad():
        next(broken.network.parameters()).fill_(float("nan"))
    with pytest.raises(UserError, match="not finite numbers"):
        broken.sample(n=1, steps=1, show_progress=False)
