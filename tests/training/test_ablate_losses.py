"""An ablation compares what it was asked to compare, and says where nothing is decided."""

from __future__ import annotations

import contextlib
import importlib.util
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import scipy.stats
import yaml
from hypothesis import given
from hypothesis import strategies as st

from improved_diffusion.errors import UserError

PROJECT = Path(__file__).parent.parent.parent
spec = importlib.util.spec_from_file_location("ablate_losses", PROJECT / "scripts" / "ablate_losses.py")
ablation = importlib.util.module_from_spec(spec)
spec.loader.exec_module(ablation)

scores = st.lists(st.floats(0.1, 100), min_size=2, max_size=6)


class TestStatistics:
    @given(scores, scores, st.sampled_from([0.9, 0.95]))
    def test_the_interval_is_that_of_a_paired_t_test(self, first, second, confidence):
        n = min(len(first), len(second))
        differences = [b - a for a, b in zip(first[:n], second[:n], strict=True)]
        low, high = ablation.t_interval(differences, confidence)
        if np.std(differences) > 1e-6:
            expected = scipy.stats.ttest_rel(second[:n], first[:n]).confidence_interval(confidence)
            assert (low, high) == pytest.approx((expected.low, expected.high), rel=1e-6)
        else:
            assert low == pytest.approx(high, abs=1e-4)

    @pytest.mark.parametrize("arms", [2, 3])
    @pytest.mark.parametrize("seeds", [2, 3])
    def test_where_nothing_differs_hardly_anything_wins(self, arms, seeds):
        rng = np.random.default_rng(0)
        wins = 0
        for _ in range(400):
            of_seed = rng.normal(size=seeds)  # what the runs of one seed share
            drawn = {str(arm): (3 + of_seed + 0.3 * rng.normal(size=seeds)).tolist() for arm in range(arms)}
            wins += any("wins" in line for line in ablation.verdicts(drawn))
        assert wins / 400 < 0.08  # 5 %, and what 400 draws leave open

    def test_a_difference_that_every_seed_shows_is_found(self):
        of_seed = np.array([1.0, 3.0, 2.0, 9.0])  # far apart, as ranges they overlap
        noise = np.array([0.01, -0.01, 0.02, 0.0])
        (line,) = ablation.verdicts({"mse": (of_seed + 0.5).tolist(), "hybrid": (of_seed + noise).tolist()})
        assert "hybrid wins" in line
        assert "4 seeds" in line

    def test_one_seed_decides_nothing(self):
        (line,) = ablation.verdicts({"mse": [3.0], "hybrid": [1.0]})
        assert "Not decided" in line
        assert "2.000" in line

    def test_only_steps_that_all_runs_have_count(self):
        table = ablation.compare({"mse": [{5: 3.0, 10: 2.0}], "hybrid": [{5: 2.5, 10: 2.4, 15: 0.1}]})
        assert "| best | 2.000 | 2.400 |" in table
        with pytest.raises(UserError, match="no evaluated step in common"):
            ablation.compare({"mse": [{5: 3.0}], "hybrid": [{10: 2.0}]})


class TestSettings:
    @pytest.fixture
    def config_file(self, tmp_path, tiny_set) -> Path:
        file = tmp_path / "config.yaml"
        file.write_text(yaml.safe_dump({"data": str(tiny_set), "training": {"batch_size": 4}}))
        return file

    def keep(self, config_file: Path, *flags: str) -> None:
        settings = ablation.settled("mse", config_file, list(flags))
        ablation.require_same_settings(settings, config_file.parent / "out" / "mse.yaml")

    def test_those_of_the_runs_that_are_there_are_required(self, config_file, tiny_set, monkeypatch):
        self.keep(config_file, "--training.lr=1e-3")
        for flags in ([], ["--training.lr=1e-4"], ["--training.lr=1e-3", "--evaluation.samples_per_class=5"]):
            with pytest.raises(UserError, match=r"other settings, .*--out: .*(training.lr|samples_per_class)"):
                self.keep(config_file, *flags)
        monkeypatch.chdir(tiny_set.parent)
        self.keep(config_file, "--training.lr=0.001", "--training.steps=7", f"--data={tiny_set.name}")

    @pytest.mark.parametrize("flag", ["--seed=3", "--loss=mse", "--resume=x"])
    def test_flags_of_the_ablations_own_are_refused(self, flag):
        with pytest.raises(UserError, match=flag.split("=")[0]):
            ablation.main([flag])


def test_runs_that_were_measured_in_different_ways_are_not_compared():
    record = {"step": 5, "value": 1.0, "features": 64, "n_fake": 12}
    ablation.require_one_protocol({("mse", 0): [record], ("hybrid", 0): [{**record, "value": 2.0}]})
    with pytest.raises(UserError, match="n_fake 12 to 24"):
        ablation.require_one_protocol({("mse", 0): [record], ("hybrid", 0): [{**record, "n_fake": 24}]})


def test_a_run_that_is_there_is_given_the_flags_again(run_script, tiny_config_file, tiny_set, tmp_path, monkeypatch):
    outcomes = []

    class InThisProcess(contextlib.nullcontext):
        """Instead of a new process, which would take seconds to import torch."""

        def __init__(self, command: list[str]):
            super().__init__(self)
            outcomes.append(run_script("train.py", *command[2:]))

        def wait(self) -> int:
            return outcomes[-1].code

    monkeypatch.setattr(ablation, "subprocess", SimpleNamespace(Popen=InThisProcess))
    out = tmp_path / "ablation"
    trained = run_script("train.py", "--config", tiny_config_file, "--loss=mse", "--out", out / "mse-seed0")
    assert trained.code == 0, trained.err
    command = ["--losses=mse", "--seeds=1", f"--out={out}", f"--config={tiny_config_file}"]
    with pytest.raises(UserError, match="exit status 2"):
        ablation.main([*command, "--training.lr=5e-3"])
    assert "cannot change training.lr from 0.001 to 0.005" in outcomes[-1].err
    (out / "mse.yaml").unlink()  # as in an ablation that is older than this file
    monkeypatch.chdir(tiny_set.parent)
    with pytest.raises(UserError, match="never scored"):  # it went on, to the end
        ablation.main([*command, f"--data={tiny_set.name}", "--training.lr=1e-3", "--training.steps=14"])
    assert (out / "mse-seed0" / "checkpoints" / "step_0000014.pt").is_file()
