from __future__ import annotations

import multiprocessing
import time

import pytest
import torch

from improved_diffusion.checkpoint_file import read_checkpoint, write_checkpoint
from improved_diffusion.config import Config
from improved_diffusion.config_file import load_config
from improved_diffusion.errors import UserError
from improved_diffusion.run_directory import RunDirectory, is_run_directory
from improved_diffusion.training.start import held_by_first, new_run


@pytest.fixture
def run(tmp_path) -> RunDirectory:
    return RunDirectory(tmp_path / "run")


def steps(run: RunDirectory) -> list[int]:
    return [read_checkpoint(file)["step"] for file in run.checkpoint_files()]


def test_the_newest_and_the_best_checkpoints_are_kept(run):
    for step in (1, 2, 3, 4, 5):
        run.save_checkpoint({"step": step}, keep=2)
        if step == 2:
            run.point("best", run.checkpoint_file(2))
    assert steps(run) == [2, 4, 5]
    assert run.latest_checkpoint() == run.checkpoint_file(5)
    assert run.pointed("best") == run.checkpoint_file(2)


def test_going_on_from_an_earlier_checkpoint_keeps_what_it_writes(run):
    for step in (10, 20, 30):
        run.save_checkpoint({"step": step}, keep=3)
    run.save_checkpoint({"step": 15}, keep=1)
    assert 15 in steps(run)
    assert run.latest_checkpoint() == run.checkpoint_file(15)


def test_a_pointer_to_a_file_that_has_gone_is_passed_over(run):
    run.save_checkpoint({"step": 1}, keep=2)
    run.save_checkpoint({"step": 2}, keep=2)
    run.checkpoint_file(2).unlink()
    assert run.latest_checkpoint() == run.checkpoint_file(1)


def test_settings_and_provenance_come_back(run):
    config = Config(loss="mse", data="somewhere", seed=3)
    run.write_config(config, [{"command_line": "x"}])
    assert run.read_config() == config
    assert load_config(run.config_file) == config  # a run's settings are a config like any other
    assert run.read_provenance() == [{"command_line": "x"}]


def test_leftovers_of_a_killed_save_are_removed(run):
    run.save_checkpoint({"step": 1}, keep=1)
    (run.checkpoints / ".step_0000002.pt.abc.tmp").write_bytes(b"half")
    run.remove_leftovers()
    assert sorted(file.name for file in run.checkpoints.iterdir()) == ["latest", "step_0000001.pt"]


def test_what_a_checkpoint_must_hold(run):
    run.save_checkpoint({"step": 1, "weights": torch.ones(2)}, keep=1)
    assert read_checkpoint(run.latest_checkpoint(), ("step", "weights"))["step"] == 1
    with pytest.raises(UserError, match="no optimizer"):
        read_checkpoint(run.latest_checkpoint(), ("step", "optimizer"))


def test_is_run_directory(run, tmp_path):
    assert not is_run_directory(run.path)
    run.save_checkpoint({"step": 1}, keep=1)
    run.write_config(Config(), [])
    assert is_run_directory(run.path)


def hold(run: RunDirectory) -> None:
    with run.held():
        (run.path / "held").touch()
        time.sleep(60)


class TestHolding:
    """One process trains in a directory; the system lets go of it when that process ends, however it ends."""

    def test_a_second_process_is_refused_until_the_first_is_killed(self, run):
        process = multiprocessing.get_context("fork").Process(target=hold, args=(run,))
        process.start()
        while not (run.path / "held").is_file():
            assert process.is_alive()
            time.sleep(0.01)
        with pytest.raises(UserError, match=f"another process trains in {run.path}"), run.held():
            pass
        process.kill()
        process.join(60)
        with run.held():
            pass

    def test_a_directory_in_which_nothing_was_written_does_not_stay(self, run):
        with run.held():
            assert run.path.is_dir()
        assert not run.path.exists()
        with run.held():
            run.metrics_file.touch()
        assert run.metrics_file.is_file()

    def test_new_runs_started_together_have_directories_of_their_own(self, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        with new_run(None, "x") as one, new_run(None, "x") as two:
            assert {one.path.name, two.path.name} == {"x", "x-2"}
            with pytest.raises(UserError, match="another process trains in runs/x:"), new_run("runs/x", "x"):
                pass

    def test_a_directory_without_checkpoints_can_be_used(self, run):
        run.checkpoints.mkdir(parents=True)
        with new_run(str(run.path), "x"):
            run.save_checkpoint({"step": 1}, keep=1)
        with pytest.raises(UserError, match="already holds a run"), new_run(str(run.path), "x"):
            pass

    def test_where_the_first_process_is_refused_all_are(self, run):
        with pytest.raises(UserError, match="no"), held_by_first(run.held(), False, lambda value: UserError("no")):
            pass
        with run.held():
            said = []
            with pytest.raises(UserError), held_by_first(run.held(), True, lambda value: said.append(value) or value):
                pass
        assert "another process" in str(said[0])

    @pytest.mark.parametrize("flags", [("--out",), ("--resume",)], ids=str)
    def test_on_the_command_line(self, run, run_script, tiny_set, flags):
        with run.held():
            run.write_config(Config(data=str(tiny_set)), [])
            outcome = run_script("train.py", *flags, run.path)
        assert outcome.is_one_clear_line(), outcome.err
        assert str(run.path) in outcome.err


def test_a_checkpoint_that_is_mapped_is_whole(tmp_path):
    """Of which what is not looked at stays in the file; damage there is told all the same."""
    file, weights = tmp_path / "step_0000001.pt", torch.arange(1000.0)
    write_checkpoint(file, {"step": 1, "weights": weights})
    assert torch.equal(read_checkpoint(file, mapped=True)["weights"], weights)
    content = file.read_bytes()
    place = content.index(weights.numpy().tobytes()) + 17
    file.write_bytes(content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :])
    with pytest.raises(UserError, match="is damaged"):
        read_checkpoint(file, mapped=True)
