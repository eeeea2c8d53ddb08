"""A run that was interrupted, in whatever way, ends as one that was not, bit for bit."""

from __future__ import annotations

import multiprocessing
import os
import signal
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed.run

from improved_diffusion.checkpoint_file import read_checkpoint, write_checkpoint
from improved_diffusion.data import open_image_set
from improved_diffusion.files import read_jsonl
from improved_diffusion.run_directory import RunDirectory
from improved_diffusion.runtime.devices import Processes
from improved_diffusion.training.evaluation import Evaluator
from improved_diffusion.training.loop import TrainingLoop
from improved_diffusion.training.trainer import Trainer

PROJECT = Path(__file__).parents[2]


def assert_same(one: object, other: object, where: str = "state") -> None:
    """Equal types, keys, and bits."""
    assert type(one) is type(other), where
    if isinstance(one, torch.Tensor):
        assert torch.equal(one, other), where
    elif isinstance(one, dict):
        assert one.keys() == other.keys(), where
        for key in one:
            assert_same(one[key], other[key], f"{where}[{key!r}]")
    elif isinstance(one, list):
        assert len(one) == len(other), where
        for index, pair in enumerate(zip(one, other, strict=True)):
            assert_same(*pair, f"{where}[{index}]")
    else:
        assert one == other, where


def assert_same_run(one: Path, other: Path) -> None:
    """The same last checkpoint and the same record, but for the clock."""
    states = [read_checkpoint(RunDirectory(path).latest_checkpoint()) for path in (one, other)]
    assert_same(*states)
    records = [read_jsonl(RunDirectory(path).metrics_file) for path in (one, other)]
    for record in records[0] + records[1]:
        del record["images_per_second"], record["tflops"]
    assert records[0] == records[1]


def take_steps(trainer, steps: int) -> None:
    batches = trainer.stream.batches(trainer.step)
    for _ in range(steps):
        trainer.train_step(*next(batches))


@pytest.mark.parametrize(
    "flags",
    [
        ["--loss=hybrid"],
        ["--loss=mse", "--training.accumulation=2", "--diffusion.timestep_sampler=stratified"],
        ["--training.lr_schedule=wsd", "--training.optimizer=muon", "--training.ema_lengths=[0.05, 0.1]"],
        ["--loss=mse", "--training.augment=0.5"],
        # Three timesteps, so that the history of the losses fills and decides what is drawn after the resume.
        ["--loss=vlb", "--diffusion.timesteps=3", "--training.warmup_steps=12"],
    ],
    ids=["hybrid", "mse", "muon", "augmented", "vlb"],
)
def test_half_the_steps_and_a_resume_equal_all_the_steps(tiny_trainer, tmp_path, flags):
    half = 10 if "--loss=vlb" in flags else 5
    unbroken, resumed = (tiny_trainer(*flags) for _ in range(2))
    take_steps(unbroken, half)
    write_checkpoint(tmp_path / "half.pt", unbroken.state_dict())
    take_steps(unbroken, half)
    resumed.load_state_dict(read_checkpoint(tmp_path / "half.pt"))
    take_steps(resumed, half)
    assert_same(unbroken.state_dict(), resumed.state_dict())
    if "--loss=vlb" in flags:
        assert unbroken.timestep_sampler.probabilities().std() > 0.01  # no longer uniform


FLAGS = ["--training.log_every=5", "--training.save_every=4"]


@pytest.fixture(scope="module")
def unbroken(train_tiny) -> Path:
    """A run with `FLAGS` that nothing interrupts."""
    return train_tiny(*FLAGS)


def test_a_killed_run_goes_on_as_if_nothing_had_happened(
    start_script, run_script, unbroken, tiny_config_file, tmp_path
):
    killed = tmp_path / "killed"
    started = start_script("train.py", "--config", tiny_config_file, *FLAGS, "--out", killed)
    started.wait_for((killed / "checkpoints" / "latest").is_file)
    assert started.send(signal.SIGKILL).code == -signal.SIGKILL
    outcome = run_script("train.py", "--resume", killed)
    assert outcome.code == 0, outcome.err
    assert_same_run(unbroken, killed)


def test_a_worker_that_is_lost_under_torchrun_changes_nothing(start_script, tiny_config_file, tmp_path):
    """One command line starts the run and, by torchrun, all of its processes again."""
    unbroken, broken = tmp_path / "unbroken", tmp_path / "broken"
    flags = ["--config", str(tiny_config_file), "--training.save_every=3"]
    flags += ["--model.channel_multipliers=[1]", "--model.attention_resolutions=[]"]
    reference = start_script("train.py", *flags, "--out", unbroken, processes=2)
    torchrun = [torch.distributed.run.__file__, "--standalone", "--nproc-per-node=2", "--max-restarts=1"]
    torchrun += ["--monitor-interval=0.1", "--start-method=fork", "--run-path", PROJECT / "train.py"]
    environment = {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
    started = start_script(*torchrun, *flags, "--resume-if-exists", "--out", broken, environment=environment)
    started.wait_for((broken / "checkpoints" / "latest").is_file)
    agent = started.processes[0].pid
    workers = Path(f"/proc/{agent}/task/{agent}/children").read_text().split()
    os.kill(int(workers[-1]), signal.SIGKILL)
    outcome = started.finish()
    assert outcome.code == 0, outcome.err
    assert f"going on with {broken} at step" in outcome.out
    assert reference.finish().code == 0
    assert_same_run(unbroken, broken)


def test_restarts_that_could_not_work_are_refused(start_script, tiny_config_file, tmp_path):
    torchrun = {"TORCHELASTIC_MAX_RESTARTS": "3", "TORCHELASTIC_USE_AGENT_STORE": "True"}
    started = start_script("train.py", "--config", tiny_config_file, "--out", tmp_path / "run", environment=torchrun)
    outcome = started.finish()
    assert outcome.is_one_clear_line()
    assert "TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1" in outcome.err


def test_going_on_if_there_is_a_run(run_script, tiny_config_file, tmp_path):
    command = ["train.py", "--config", tiny_config_file, "--training.steps=2", "--resume-if-exists"]
    outcome = run_script(*command)
    assert outcome.is_one_clear_line()
    assert "--resume-if-exists goes on with the run at --out: give --out" in outcome.err
    outcome = run_script(*command, "--out", tmp_path / "run")
    assert (outcome.code, "going on" in outcome.out) == (0, False), outcome.err
    outcome = run_script(*command, "--out", tmp_path / "run")
    assert (outcome.code, "going on" in outcome.out) == (0, True), outcome.err


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_saves_and_exits_cleanly(start_script, run_script, tiny_config_file, tmp_path, number):
    run = RunDirectory(tmp_path / "run")
    handler = signal.signal(number, signal.SIG_DFL)  # under nohup SIGHUP would be ignored
    try:
        started = start_script(
            *("train.py", "--config", tiny_config_file, "--out", run.path),
            *("--training.steps=100000", "--training.save_every=50000"),
        )
    finally:
        signal.signal(number, handler)
    started.wait_for(lambda: run.metrics_file.is_file() and run.metrics_file.stat().st_size > 0)
    outcome = started.send(number)
    assert outcome.code == 130
    assert "Traceback" not in outcome.err
    assert f"--resume {run.path}" in outcome.out
    step = read_checkpoint(run.latest_checkpoint())["step"]
    assert 0 < step < 100000
    assert all(record["step"] % 3 == 0 for record in read_jsonl(run.metrics_file))  # the stop adds none
    outcome = run_script("train.py", "--resume", run.path, f"--training.steps={step + 2}")
    assert outcome.code == 0, outcome.err
    assert read_checkpoint(run.latest_checkpoint())["step"] == step + 2


class OneOfTwo(Processes):
    """Of two processes that are told the same and are as fast as each other, the first."""

    def average(self, x: torch.Tensor) -> torch.Tensor:
        return x

    def concatenate(self, x: torch.Tensor) -> torch.Tensor:
        return torch.cat([x, x])

    def gather(self, value: object) -> list:
        return [value, value]

    def broadcast(self, x: torch.Tensor, source: int) -> torch.Tensor:
        return x


@pytest.mark.parametrize(("seconds", "steps"), [(0.01, 10), (1, 5), (4, 1), (60, 1)])
def test_several_processes_stop_in_seconds_also_where_steps_are_slow(
    tiny_trainer, tiny_set, monkeypatch, tmp_path, seconds, steps
):
    rarely = ("--training.log_every=99", "--training.save_every=99", "--evaluation.every=99")
    trainer, clock = tiny_trainer("--training.steps=99", *rarely), [0.0]
    trainer.processes = OneOfTwo(torch.device("cpu"), world_size=2)
    monkeypatch.setattr("improved_diffusion.training.loop.time.monotonic", lambda: clock[0])
    evaluator = SimpleNamespace(metric=None, protocol={})
    loop = TrainingLoop(trainer, evaluator, RunDirectory(tmp_path / "run"), open_image_set(tiny_set))

    def step(*_: object) -> None:
        trainer.step += 1
        clock[0] += seconds
        if trainer.step == 31:
            loop.stop.signals = 1

    monkeypatch.setattr(trainer, "train_step", step)
    assert not loop.train()
    assert 31 <= trainer.step < 31 + steps
    assert read_checkpoint(loop.run.latest_checkpoint())["step"] == trainer.step


def test_a_signal_during_an_evaluation_leaves_it_to_the_resumed_run(
    run_script, tiny_config_file, tmp_path, monkeypatch
):
    out, evaluate = tmp_path / "run", Evaluator.evaluate

    def interrupted(*arguments):
        signal.raise_signal(signal.SIGINT)
        return evaluate(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(Evaluator, "evaluate", interrupted)
        assert run_script("train.py", "--config", tiny_config_file, "--out", out).code == 130
    assert read_jsonl(RunDirectory(out).evaluations_file) == []
    outcome = run_script("train.py", "--resume", out)
    assert outcome.code == 0, outcome.err
    assert [record["step"] for record in read_jsonl(RunDirectory(out).evaluations_file)] == [12]


def test_a_signal_when_all_is_done_stops_nothing(run_script, tiny_config_file, tmp_path, monkeypatch):
    evaluate = Evaluator.evaluate

    def then_interrupted(*arguments):
        result = evaluate(*arguments)
        signal.raise_signal(signal.SIGINT)
        return result

    monkeypatch.setattr(Evaluator, "evaluate", then_interrupted)
    outcome = run_script("train.py", "--config", tiny_config_file, "--out", tmp_path / "run")
    assert outcome.code == 0, outcome.err
    assert "finished" in outcome.out


@pytest.mark.parametrize("how", ["killed", "stopped"])
def test_every_line_of_the_record_is_that_of_an_unbroken_run(
    run_script, unbroken, tiny_config_file, tmp_path, monkeypatch, how
):
    """Interrupted twice, between two lines each time; a kill is an exception that nothing answers."""
    broken = tmp_path / "broken"
    step, interrupted = Trainer.train_step, {6, 9}

    def interrupting(trainer, *batch):
        if trainer.step in interrupted:
            interrupted.remove(trainer.step)
            if how == "killed":
                raise KeyboardInterrupt
            signal.raise_signal(signal.SIGINT)
            signal.raise_signal(signal.SIGTERM)  # as torchrun sends it, of a Ctrl-C
        step(trainer, *batch)

    monkeypatch.setattr(Trainer, "train_step", interrupting)
    assert run_script("train.py", "--config", tiny_config_file, *FLAGS, "--out", broken).code == 130
    assert RunDirectory(broken).latest_checkpoint().name == f"step_000000{7 if how == 'stopped' else 4}.pt"
    assert run_script("train.py", "--resume", broken).code == 130
    outcome = run_script("train.py", "--resume", broken)
    assert outcome.code == 0, outcome.err
    assert [record["step"] for record in read_jsonl(RunDirectory(broken).metrics_file)] == [5, 10, 12]
    assert_same_run(unbroken, broken)


def test_a_checkpoint_without_running_means_can_be_resumed(run_script, tiny_config_file, tmp_path):
    run = RunDirectory(tmp_path / "run")
    assert run_script("train.py", "--config", tiny_config_file, "--out", run.path, "--training.steps=4").code == 0
    state = read_checkpoint(run.latest_checkpoint())
    del state["running_terms"]
    write_checkpoint(run.latest_checkpoint(), state)
    outcome = run_script("train.py", "--resume", run.path, "--training.steps=5")
    assert outcome.code == 0, outcome.err


def killed_while_saving(path: Path) -> None:
    run, save = RunDirectory(path), torch.save
    run.save_checkpoint({"step": 1, "weights": torch.arange(1000.0)}, keep=1)

    def save_half(state, stream):
        save(state, stream)
        stream.flush()
        stream.truncate(stream.tell() // 2)
        os.kill(os.getpid(), signal.SIGKILL)

    torch.save = save_half
    run.save_checkpoint({"step": 2, "weights": torch.zeros(1000)}, keep=1)


def test_a_kill_in_the_middle_of_a_save_loses_nothing_before_it(tmp_path):
    process = multiprocessing.get_context("fork").Process(target=killed_while_saving, args=(tmp_path,))
    process.start()
    process.join(60)
    assert process.exitcode == -signal.SIGKILL
    run = RunDirectory(tmp_path)
    assert run.checkpoint_files() == [run.checkpoint_file(1)]
    assert_same(read_checkpoint(run.latest_checkpoint()), {"step": 1, "weights": torch.arange(1000.0)})
    run.save_checkpoint({"step": 2, "weights": torch.zeros(1000)}, keep=1)
    assert read_checkpoint(run.latest_checkpoint())["step"] == 2
