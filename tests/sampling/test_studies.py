"""The scripts that choose a sampler and a guidance give the numbers of fid.py, and name what they are of."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from improved_diffusion.metrics.inception.weights import packaged_weights
from improved_diffusion.run_directory import RunDirectory

pytestmark = pytest.mark.skipif(packaged_weights() is None, reason="needs the Inception weights")
CURVE, TABLE = "scripts/sampler_curve.py", "scripts/guidance_table.py"


@pytest.fixture(scope="module")
def quick_run(tiny_run, tmp_path_factory) -> Path:
    """The tiny run, which draws in four steps where it is not told otherwise."""
    run = RunDirectory(shutil.copytree(tiny_run, tmp_path_factory.mktemp("quick") / "run"))
    run.config_file.write_text(run.config_file.read_text() + "sampling: {steps: 4}\n")
    return run.path


@pytest.fixture
def measure(run_script, tiny_set, quick_run, tmp_path):
    """The FID64 that fid.py gives to the quick run's images, 2 of each class."""

    def run(*flags: str) -> float:
        result = tmp_path / "result.json"
        what = tiny_set / "test", quick_run, "--features=64", "--per-class=2", f"--json={result}"
        outcome = run_script("fid.py", *what, *flags)
        assert outcome.code == 0, outcome.err
        return json.loads(result.read_text())["measurements"][0]["value"]

    return run


def test_a_curve_has_a_point_for_each_sampler_and_number_of_evaluations(
    run_script, measure, quick_run, tiny_set, tmp_path
):
    samplers = ["ddim", "ddim:eta=1", "heun:churn=2,churn_noise=1"]
    where = quick_run, tiny_set / "test", "--per-class=2", f"--out={tmp_path / 'curve'}"
    outcome = run_script(CURVE, *where, "--evaluations", 3, 4, "--samplers", *samplers, "--guidance-scale", 2)
    assert outcome.code == 0, outcome.err
    points = json.loads((tmp_path / "curve/curve.json").read_text())["points"]
    found = {(point["sampler"], point["evaluations"], point["steps"]): point["value"] for point in points}
    assert sorted(found) == sorted(
        [("ddim", 3, 3), ("ddim", 4, 4), ("ddim:eta=1", 3, 3), ("ddim:eta=1", 4, 4), (samplers[2], 3, 2)]
    )
    assert len(points) == 5  # two steps of heun are what 3 evaluations and 4 allow: one point
    assert found["ddim", 4, 4] == measure("--sampler=ddim", "--sampling-steps=4", "--guidance-scale=2")
    noisy = measure("--sampler=ddim", "--sampling-steps=4", "--guidance-scale=2", "--sampling.options", "eta=1")
    assert found["ddim:eta=1", 4, 4] == noisy != found["ddim", 4, 4]
    assert f"| ddim:eta=1 | {found['ddim:eta=1', 3, 3]:.3f} | {noisy:.3f} |" in outcome.out
    assert (tmp_path / "curve/curve.png").stat().st_size > 0


@pytest.mark.parametrize(
    ("sampler", "message"),
    [
        ("euler", "there is no sampler 'euler', only ancestral, ddim, heun, dpmpp_2m"),
        ("ddim:eta", "NAME=VALUE with a number, such as eta=0.5, not 'eta'"),
        ("ddim:churn=1", "ddim has no option churn"),
        ("dpmpp_2m:eta=2", "eta must be between 0 and 1"),
    ],
)
def test_a_sampler_that_is_none_is_refused_before_any_work(run_script, quick_run, tiny_set, tmp_path, sampler, message):
    outcome = run_script(CURVE, quick_run, tiny_set, "--samplers", sampler, "--out", tmp_path / "curve")
    assert outcome.is_one_clear_line()
    assert message in outcome.err
    assert not (tmp_path / "curve").exists()


def test_the_scale_of_guidance_is_chosen_on_one_seed_and_reported_on_another(
    run_script, measure, quick_run, tiny_set, tmp_path
):
    where = quick_run, tiny_set / "test", "--per-class=2", f"--out={tmp_path / 'guidance'}"
    outcome = run_script(TABLE, *where, "--scales", 1.5, 3, "--interval", 0.5, 2)
    assert outcome.code == 0, outcome.err
    rows = json.loads((tmp_path / "guidance/guidance.json").read_text())
    assert [row["kind"] for row in rows] == ["none", "classifier-free", "classifier-free, 0.5 to 2"]
    for row in rows:
        assert row["values"][str(row["chosen"])] == min(row["values"].values())
    free = rows[1]
    assert free["values"]["3.0"] == measure("--guidance-scale=3", "--generation-seed=1")
    chosen = measure(f"--guidance-scale={free['chosen']}", "--generation-seed=2")
    assert free["reported"]["value"] == chosen
    assert f"{free['chosen']:g}: {chosen:.3f}" in outcome.out


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--interval", 5, 0.3], "--interval must be two increasing levels"),
        (["--seeds", 1, 1], "--seeds must differ"),
        (["--scales", 1, 2], "above 1: 1.0 is none"),
    ],
)
def test_a_table_that_would_mean_nothing_is_refused(run_script, quick_run, tiny_set, tmp_path, flags, message):
    outcome = run_script(TABLE, quick_run, tiny_set, *flags, "--out", tmp_path / "table")
    assert outcome.is_one_clear_line(), outcome.err
    assert message in outcome.err


def test_a_curve_without_points_is_refused(run_script, quick_run, tiny_set, tmp_path):
    where = quick_run, tiny_set / "test", "--per-class=2", f"--out={tmp_path / 'curve'}"
    outcome = run_script(CURVE, *where, "--evaluations", 2000, "--samplers", "ancestral")
    assert outcome.is_one_clear_line(), outcome.err
    assert "none of the samplers can take 2000 evaluations" in outcome.err
