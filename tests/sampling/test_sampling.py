"""The image of (seed, class, number) depends on nothing else, and lies in a folder that says what it is."""

from __future__ import annotations

import json
import os
import shutil

import numpy as np
import pytest
from PIL import Image

from improved_diffusion.checkpoint_file import read_checkpoint
from improved_diffusion.errors import UserError
from improved_diffusion.files import file_sha256
from improved_diffusion.metrics.images.opening import open_source
from improved_diffusion.run_directory import RunDirectory
from improved_diffusion.sampling.generate import SampleKey
from improved_diffusion.sampling.identity import identify
from improved_diffusion.sampling.loading import load
from improved_diffusion.sampling.model import change_sampling


@pytest.fixture(scope="module")
def model(tiny_run):
    return load(tiny_run, device="cpu")


def draw(model, keys, **settings) -> np.ndarray:
    sampling = change_sampling(model.config.sampling, **settings)
    return np.concatenate([images for _, images in model.draw(keys, sampling)])


KEYS = [SampleKey(0, label, number) for label in range(3) for number in range(3)]


@pytest.mark.parametrize(
    "settings",
    [
        {"sampler": "ancestral", "steps": 7, "guidance_scale": 2.0},
        {"sampler": "ddim", "steps": 5},
        {"sampler": "ancestral", "steps": 1},
        {"sampler": "ancestral", "steps": 2, "noise": "philox"},
    ],
)
def test_an_image_does_not_depend_on_the_batch(model, settings):
    whole = draw(model, KEYS, batch_size=64, **settings)
    by_fours = draw(model, KEYS, batch_size=4, **settings)
    alone = np.concatenate([draw(model, [key], batch_size=1, **settings) for key in KEYS])
    backwards = draw(model, KEYS[::-1], batch_size=2, **settings)[::-1]
    for other in (by_fours, alone, backwards):
        # Arithmetic may differ in the last digits with the size of the batch, and so a pixel by one level.
        assert np.abs(whole.astype(int) - other.astype(int)).max() <= 1
        assert (whole == other).mean() > 0.995


def test_images_differ_by_seed_class_and_number(model):
    keys = [SampleKey(0, 0, 0), SampleKey(1, 0, 0), SampleKey(0, 1, 0), SampleKey(0, 0, 1)]
    images = draw(model, keys, sampler="ddim", steps=5).astype(int)
    for i in range(4):
        for j in range(i):
            assert np.abs(images[i] - images[j]).mean() > 5


def test_which_noise_it_was_is_said_where_it_is_not_numpys(tiny_run):
    """So that records and folders that are older than the choice are of the same protocol as new ones."""
    model = load(tiny_run, device="cpu")
    drawn, said = [], []
    for noise in ("numpy", "philox"):
        sampling = change_sampling(model.config.sampling, sampler="ddim", steps=2, noise=noise)
        drawn.append(np.concatenate([images for _, images in model.draw(KEYS[:2], sampling)]).astype(int))
        said.append(model.image_record(sampling))
    assert np.abs(drawn[0] - drawn[1]).mean() > 5
    assert "noise" not in said[0]
    assert said[1] == {**said[0], "noise": "philox"}
    sampling = change_sampling(model.config.sampling, noise="philox")
    with pytest.raises(UserError, match="seed 18446744073709551616"):
        next(model.draw([SampleKey(2**64, 0, 0)], sampling))


def test_two_processes_write_the_images_of_one(tiny_run, finish_script, tmp_path):
    for processes in (1, 2):
        out = tmp_path / str(processes)
        finish_script("sample.py", "--run", tiny_run, "--n", 3, "--npz", "--out", out, processes=processes)
    one, two = (np.load(tmp_path / str(n) / "samples.npz") for n in (1, 2))
    assert one["arr_0"].shape == (9, 16, 16, 3)
    assert one["labels"].tolist() == two["labels"].tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2]
    assert np.abs(one["arr_0"].astype(int) - two["arr_0"].astype(int)).max() <= 1


def test_files(tiny_run, model, run_script, tmp_path):
    arguments = ("--run", tiny_run, "--class", "waffles", "--n", 2, "--seed", 5, "--out", tmp_path / "out")
    outcome = run_script("sample.py", *arguments)
    assert outcome.code == 0, outcome.err
    files = sorted(path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*.png"))
    assert files == ["out.png", "out/waffles/seed5_000000.png", "out/waffles/seed5_000001.png"]
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert manifest["keys"] == [[5, "waffles", 0], [5, "waffles", 1]]
    assert manifest["checkpoint_sha256"] == file_sha256(tiny_run / "checkpoints" / "step_0000001.pt")
    assert (manifest["sampler"], manifest["sampling_steps"], manifest["guidance_scale"]) == ("ancestral", 20, 1.0)
    assert manifest["ema_rate"] is None
    expected = draw(model, [SampleKey(5, 2, 0), SampleKey(5, 2, 1)])
    for number in range(2):
        image = np.asarray(Image.open(tmp_path / "out" / "waffles" / f"seed5_{number:06d}.png"))
        assert np.abs(image.astype(int) - expected[number].astype(int)).max() <= 1


def test_several_classes_are_drawn_once_each(tiny_run, model, run_script, tmp_path):
    first, _, last = model.class_names
    classes = ("--class", last, first, last)
    outcome = run_script("sample.py", "--run", tiny_run, *classes, "--n", 1, "--out", tmp_path / "x")
    assert outcome.code == 0, outcome.err
    assert sorted(path.name for path in (tmp_path / "x").iterdir() if path.is_dir()) == sorted([first, last])
    assert json.loads((tmp_path / "x" / "manifest.json").read_text())["keys"] == [[0, last, 0], [0, first, 0]]


class TestFolder:
    """A folder holds the samples of one model and one set of settings."""

    @pytest.fixture
    def sample(self, tiny_run, run_script, tmp_path):
        def run(*flags: object, out="out", of=tiny_run):
            common = ["--run", of, "--n", 1, "--sampling-steps", 2, "--out", tmp_path / out]
            return run_script("sample.py", *common, *flags)

        return run

    def images(self, folder) -> dict[str, bytes]:
        return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*.png")}

    @pytest.mark.parametrize(
        ("flags", "words"),
        [
            (["--sampling-steps", 3], "sampling_steps 2, not 3"),
            (["--guidance-scale", 2.0, "--sampler", "ddim"], "sampler ancestral, not ddim"),
            (["--seed", 1], "other seeds, classes or numbers"),
            (["--class", "waffles"], "other seeds, classes or numbers"),
        ],
    )
    def test_of_other_samples_is_refused_and_replaced_when_told_so(self, sample, tmp_path, flags, words):
        assert sample("--npz").code == 0
        before = self.images(tmp_path / "out")
        refused = sample(*flags)
        assert refused.is_one_clear_line(), refused
        assert words in refused.err
        assert "--overwrite" in refused.err
        assert self.images(tmp_path / "out") == before
        assert sample(*flags, "--overwrite").code == 0
        assert sample(*flags, out="fresh").code == 0
        assert self.images(tmp_path / "out") == self.images(tmp_path / "fresh")
        assert not (tmp_path / "out" / "samples.npz").exists()  # that was of the others

    def test_of_the_same_samples_is_completed(self, sample, tmp_path):
        assert sample().code == 0
        before = self.images(tmp_path / "out")
        (tmp_path / "out" / "waffles" / "seed0_000000.png").unlink()  # as after a kill
        with pytest.warns(UserWarning, match="1 of 3 images are missing, and 0 others"):
            identity = identify(open_source(tmp_path / "out"))
        assert (identity["n"], identity["generation_seed"], identity["sampling_steps"]) == (2, 0, 2)
        outcome = sample("--batch-size", 2)
        assert outcome.code == 0, outcome.err
        assert self.images(tmp_path / "out").keys() == before.keys()

    def test_of_another_checkpoint_is_refused(self, sample, tiny_run, tmp_path):
        assert sample().code == 0
        shutil.copytree(tiny_run, tmp_path / "moved")
        assert sample(of=tmp_path / "moved").code == 0  # the same checkpoint, wherever it lies
        run = RunDirectory(tmp_path / "moved")
        state = read_checkpoint(run.latest_checkpoint())
        run.save_checkpoint({**state, "step": 2}, keep=1)
        refused = sample(of=tmp_path / "moved")
        assert refused.is_one_clear_line(), refused
        assert "checkpoint_sha256" in refused.err

    def test_of_images_from_elsewhere_is_never_touched(self, sample, tmp_path):
        photo = tmp_path / "out" / "waffles" / "photo.jpg"
        photo.parent.mkdir(parents=True)
        photo.write_bytes(b"dear")
        for flags in ([], ["--overwrite"]):
            refused = sample(*flags)
            assert refused.is_one_clear_line(), refused
            assert "photo.jpg" in refused.err
        assert [path.name for path in (tmp_path / "out").rglob("*.*")] == ["photo.jpg"]

    def test_by_default_has_a_name_of_its_own(self, tiny_run, run_script, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        for flags in ([], ["--seed", 1], ["--seed", 2], ["--seed", 1]):
            outcome = run_script("sample.py", "--run", tiny_run, "--n", 1, "--sampling-steps", 2, *flags)
            assert outcome.code == 0, outcome.err
        name = tiny_run.name
        folders = sorted(path.name for path in (tmp_path / "samples").iterdir() if path.is_dir())
        assert folders == [name, f"{name}-2", f"{name}-3"]


@pytest.fixture
def averaged_run(tiny_run, tmp_path):
    """A run with two moving averages, of which the second is the weights."""
    shutil.copytree(tiny_run, tmp_path / "averaged")
    run = RunDirectory(tmp_path / "averaged")
    state = read_checkpoint(run.latest_checkpoint())
    halved = {name: tensor / 2 for name, tensor in state["model"].items()}
    run.save_checkpoint({**state, "ema": {"0.9": halved, "0.9999": state["model"]}}, keep=1)
    return run.path


def test_any_moving_average_can_be_sampled(averaged_run, tiny_run, run_script, tmp_path):
    def sample(run, *flags):
        outcome = run_script("sample.py", "--run", run, "--n", 1, "--sampling-steps", 2, "--npz", *flags)
        assert outcome.code == 0, outcome.err
        return np.load(tmp_path / "out" / "samples.npz")["arr_0"]

    out = ["--out", tmp_path / "out", "--overwrite"]
    weights, first = sample(tiny_run, *out), sample(averaged_run, *out)
    second = sample(averaged_run, *out, "--ema=0.9999")
    assert json.loads((tmp_path / "out" / "manifest.json").read_text())["ema_rate"] == 0.9999
    assert (second == weights).all()
    assert (first != weights).mean() > 0.5
    refused = run_script("sample.py", "--run", averaged_run, "--ema=0.5")
    assert refused.is_one_clear_line(), refused
    assert "0.9, 0.9999" in refused.err
    with pytest.raises(UserError, match="it has none"):
        load(tiny_run, ema=0.9)


def test_without_a_run_the_newest_of_the_pixel_job_is_taken(tiny_run, run_script, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for age, name in enumerate(("tuned", "mine", "older")):
        shutil.copytree(tiny_run, tmp_path / "runs" / name)
        os.utime(tmp_path / "runs" / name / "checkpoints" / "latest", (1000 - age, 1000 - age))
    (tmp_path / "runs" / "tuned" / "config.yaml").write_text("base: tiny\nmethod: lora\nseed: 0\n")
    outcome = run_script("sample.py", "--n", 1, "--sampling-steps", 1)
    assert outcome.code == 0, outcome.err
    assert f"runs{os.sep}mine" in outcome.out


def test_on_a_cpu_no_more_images_are_drawn_at_once_than_are_fast(model):
    keys = [SampleKey(0, 0, number) for number in range(35)]
    settings = change_sampling(model.config.sampling, steps=1, batch_size=128)
    assert [len(images) for _, images in model.draw(keys, settings)] == [32, 3]
