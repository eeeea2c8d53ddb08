"""What a notebook's user types: `load`, `Model.sample`, `fid`; and that the command lines say the same."""

from __future__ import annotations

import dataclasses
import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml

import improved_diffusion
from improved_diffusion.checkpoint_file import read_checkpoint
from improved_diffusion.errors import UserError
from improved_diffusion.files import file_sha256
from improved_diffusion.metrics import open_source
from improved_diffusion.metrics.inception.weights import packaged_weights
from improved_diffusion.run_directory import RunDirectory
from improved_diffusion.sampling.flags import split_guide

PROJECT = Path(improved_diffusion.__file__).parent.parent


@pytest.fixture(scope="module")
def model(tiny_run):
    return improved_diffusion.load(tiny_run)


@pytest.fixture
def other_run(tiny_run, tmp_path):
    """A copy of the run with a further checkpoint, of other weights, that draws in two steps."""
    shutil.copytree(tiny_run, tmp_path / "other")
    run = RunDirectory(tmp_path / "other")
    state = read_checkpoint(run.latest_checkpoint())
    weights = {name: tensor * 0.9 for name, tensor in state["model"].items()}
    run.save_checkpoint({**state, "step": 2, "model": weights}, keep=2)
    run.config_file.write_text(run.config_file.read_text() + "sampling: {sampler: ddim, steps: 2}\n")
    return run.path


FEW = {"sampler": "ddim", "steps": 2, "show_progress": False}


class TestSample:
    def test_draws_the_pictures_of_sample_py(self, model, tiny_run, run_script, tmp_path):
        outcome = run_script(
            *("sample.py", "--run", tiny_run, "--n", 2, "--seed", 3, "--npz", "--out", tmp_path / "out"),
            *("--sampler", "heun", "--sampling-steps", 3, "--sampling.options", "churn=2", "--spacing", "log_snr"),
            *("--guidance-scale", 1.5, "--guidance-interval", 0.1, 20, "--batch-size", 4, "--noise", "philox"),
        )
        assert outcome.code == 0, outcome.err
        images = model.sample(
            n=2,
            seed=3,
            steps=3,
            guidance_scale=1.5,
            sampler="heun",
            spacing="log_snr",
            options={"churn": 2},
            guidance_interval=(0.1, 20),
            noise="philox",
            batch_size=4,
        )
        assert images.dtype == np.uint8
        assert (images == np.load(tmp_path / "out" / "samples.npz")["arr_0"]).all()

    def test_is_ordered_class_by_class(self, model):
        assert model.class_names == ("apple_pie", "creme_brulee", "waffles")
        whole = model.sample(n=2, **FEW)
        assert whole.shape == (6, 16, 16, 3)
        some = model.sample(["waffles", 0], n=2, **FEW).astype(int)
        assert np.abs(some - np.concatenate([whole[4:], whole[:2]])).max() <= 1  # other batches round otherwise
        assert (model.sample("waffles", n=2, **FEW) == model.sample(2, n=2, **FEW)).all()

    def test_is_guided_by_another_model(self, model, tiny_run, other_run, run_script, tmp_path):
        guide = improved_diffusion.load(other_run, checkpoint="step_0000002.pt")
        images = model.sample(guidance_scale=2, guide=guide, **FEW)
        assert (images != model.sample(guidance_scale=2, **FEW)).any()
        outcome = run_script(
            *("sample.py", "--run", tiny_run, "--guide", f"{other_run}:step_0000002.pt", "--guidance-scale", 2),
            *("--sampler=ddim", "--sampling-steps=2", "--n=1", "--npz", "--out", tmp_path / "out"),
        )
        assert outcome.code == 0, outcome.err
        assert (images == np.load(tmp_path / "out" / "samples.npz")["arr_0"]).all()
        with pytest.raises(UserError, match="guidance scale 1"):
            model.sample(guide=guide, **FEW)

    @pytest.mark.parametrize(
        ("wrong", "words"),
        [
            ({"classes": ["waffle"]}, "near it: waffles"),
            ({"classes": [3]}, "no class of index 3"),
            ({"classes": []}, "no classes to draw"),
            ({"n": 0}, "n must be at least 1"),
            ({"seed": -1}, "the seed at least 0"),
            ({"sampler": "euler"}, "sampler must be one of 'ancestral'"),
            ({"spacing": "even"}, "spacing"),
            ({"steps": 0}, "sampling.steps must be at least 1"),
            ({"steps": 21}, "20 timesteps"),
            ({"steps": 2.5}, "steps must be a whole number"),
            ({"options": {"eta": 0.5}, "sampler": "heun"}, "heun has no option eta"),
            ({"guidance_interval": (5, 0.2)}, "two increasing levels"),
        ],
    )
    def test_says_what_is_wrong(self, model, wrong, words):
        with pytest.raises(UserError, match=words):
            model.sample(**{"show_progress": False, **wrong})


class TestLoad:
    def test_takes_a_checkpoint_file(self, model, other_run):
        first, second = (
            improved_diffusion.load(other_run / "checkpoints" / f"step_000000{step}.pt") for step in (1, 2)
        )
        assert (first.step, second.step) == (1, 2)
        assert (first.sample(**FEW) == model.sample(**FEW)).all()
        assert (second.sample(**FEW) == improved_diffusion.load(other_run).sample(**FEW)).all()

    def test_takes_the_model_that_ships(self, monkeypatch, tmp_path):
        monkeypatch.chdir(tmp_path)
        shipped = improved_diffusion.load("pretrained")
        assert shipped.sample(["creme_brulee"], n=2, steps=1, show_progress=False).shape == (2, 64, 64, 3)
        assert shipped.config.model.image_size == 64

    def test_remembers_which_file_it_was(self, other_run):
        model = improved_diffusion.load(other_run)
        expected = file_sha256(model.checkpoint)
        model.checkpoint.write_bytes(b"of another training")
        assert model.checkpoint_sha256 == expected == dataclasses.replace(model).checkpoint_sha256

    @pytest.mark.parametrize(
        ("path", "words"),
        [
            ("nowhere", "no run directory at"),
            ("elsewhere.pt", "not in the checkpoints of a run directory"),
            ("text.txt", "is no model"),
            ("other/checkpoints/step_0000009.pt", "there are step_0000001.pt"),
        ],
    )
    def test_says_what_is_wrong(self, other_run, path, words):
        for name in ("elsewhere.pt", "text.txt"):
            (other_run.parent / name).write_text("no model")
        with pytest.raises(UserError, match=words):
            improved_diffusion.load(other_run.parent / path)
        with pytest.raises(UserError, match="can only be chosen of a run directory"):
            improved_diffusion.load(other_run / "checkpoints" / "step_0000001.pt", checkpoint="best")


@pytest.mark.skipif(packaged_weights() is None, reason="needs the Inception weights")
class TestFid:
    @pytest.fixture(autouse=True)
    def _cache(self, monkeypatch, tmp_path):
        monkeypatch.setenv("IMPROVED_DIFFUSION_CACHE", str(tmp_path / "cache"))

    def test_of_paths_arrays_and_models_are_the_same(self, other_run, tiny_set, run_script, tmp_path):
        real, model = tmp_path / "real.npz", improved_diffusion.load(other_run)
        few = open_source(tiny_set / "test").subset(np.arange(0, 36, 4))
        np.savez(real, images=few.images, labels=few.labels, class_names=few.class_names)
        images = model.sample(n=3, seed=1)
        measured = improved_diffusion.fid(real, images, features=64)
        assert (measured.metric, measured.features, measured.n_real, measured.n_fake) == ("FID64", 64, 9, 9)
        assert measured.low < measured.value < measured.high
        assert improved_diffusion.fid(few.images, images, features=64).value == pytest.approx(measured.value)
        for drawn in (model, other_run):  # as many of each class as there are, in batches of another order
            value = improved_diffusion.fid(real, drawn, features=64).value
            assert value == pytest.approx(measured.value, rel=0.02)
        assert run_script("fid.py", real, other_run, "--features", 64, "--json", tmp_path / "fid.json").code == 0
        assert json.loads((tmp_path / "fid.json").read_text())["value"] == value

    def test_says_what_is_wrong(self, model, tiny_set):
        with pytest.raises(UserError, match="uint8"):
            improved_diffusion.fid(tiny_set, np.zeros((4, 16, 16, 3)), features=64)
        with pytest.raises(UserError, match="two runs"):
            improved_diffusion.fid(model, model, features=64)
        with pytest.raises(UserError, match="there is nothing at"):
            improved_diffusion.fid(tiny_set, "nowhere", features=64)


@pytest.mark.skipif(packaged_weights() is None, reason="needs the Inception weights")
def test_two_models_draw_from_noise_of_their_own(model):
    """From the same noise they would draw the same pictures, at no distance from each other."""
    result = improved_diffusion.fid(model, model, features=64, per_class=3)
    assert result.value > 1e-3


@pytest.mark.parametrize(("wrong", "words"), [({"n": -2}, "n is -2"), ({"confidence": 95}, "confidence is 95")])
def test_a_number_that_cannot_be_is_refused(model, wrong, words):
    with pytest.raises(UserError, match=words):
        improved_diffusion.fid(model, model, per_class=3, **wrong)


def test_how_a_model_draws_is_not_said_where_there_is_none(run_script, tiny_set):
    flags = "--checkpoint=latest", "--guidance-scale=4", "--per-class=7"
    outcome = run_script("fid.py", tiny_set, tiny_set / "test", "--features=64", *flags)
    assert outcome.is_one_clear_line(), outcome.err
    assert "per-class, checkpoint, guidance-scale: these say what a run or a model draws" in outcome.err


def test_a_guide_may_have_a_colon_in_its_name(tmp_path):
    (tmp_path / "lr:2e-4").mkdir()
    assert split_guide(str(tmp_path / "lr:2e-4")) == (str(tmp_path / "lr:2e-4"), None)
    assert split_guide(f"{tmp_path / 'lr:2e-4'}:latest") == (str(tmp_path / "lr:2e-4"), "latest")
    assert split_guide("runs/a") == ("runs/a", None)


def test_it_is_imported_without_torch():
    code = (
        "import sys, improved_diffusion; improved_diffusion.__version__; assert 'torch' not in sys.modules\n"
        "assert {'load', 'fid', 'Model'} <= set(dir(improved_diffusion))\n"
        "try: improved_diffusion.unload\n"
        "except AttributeError as error: assert 'unload' in str(error)\n"
        "else: raise SystemExit('no error')\n"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_the_version_is_in_the_record_of_a_run_and_in_the_package(tiny_trainer, tiny_set, tmp_path):
    from improved_diffusion.data import open_image_set
    from improved_diffusion.training.start import record_provenance

    trainer, run = tiny_trainer(), RunDirectory(tmp_path)
    record_provenance(run, trainer.config, open_image_set(tiny_set), trainer.processes)
    (entry,) = yaml.safe_load(run.config_file.read_text())["provenance"]
    assert entry["versions"]["improved_diffusion"] == improved_diffusion.__version__
    installed = subprocess.run([sys.executable, "setup.py", "--version"], cwd=PROJECT, capture_output=True, text=True)
    assert installed.stdout.split()[-1] == improved_diffusion.__version__
