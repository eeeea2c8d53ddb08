"""A run of `personalize.py train` that was interrupted, in whatever way, ends as one that was not."""

from __future__ import annotations

import json
import shutil
import signal
from pathlib import Path

import pytest
import torch

pytest.importorskip("diffusers")
pytest.importorskip("accelerate")
from improved_diffusion.personalize.training.trainer import Trainer  # noqa: E402
from improved_diffusion.run_directory import RunDirectory  # noqa: E402

pytestmark = pytest.mark.usefixtures("no_estimate")

# All that draws from a generator, or keeps a state.
EVERYTHING = (
    "--train_text_encoder=true",
    "--images.crops=2",
    "--images.flip=true",
    "--images.held_out=1",
    "--prior.images=3",
    "--prior.steps=2",
    "--adapter.dropout=0.1",
    "--training.accumulation=2",
    "--training.ema_rate=0.9",
    "--training.min_snr_gamma=5",
    "--training.noise_offset=0.1",
    "--training.warmup_steps=2",
    "--training.save_every=2",
)
UNSEEN = "--watch.every=null"  # no looks


def checkpoint(run: Path, step: int) -> dict:
    return torch.load(run / "checkpoints" / f"step_{step:07d}.pt", weights_only=True)


def assert_equal(one, other) -> None:
    """Bit for bit, through dicts and lists."""
    if isinstance(one, dict):
        assert set(one) == set(other)
        for key in one:
            assert_equal(one[key], other[key])
    elif isinstance(one, list | tuple):
        for a, b in zip(one, other, strict=True):
            assert_equal(a, b)
    elif isinstance(one, torch.Tensor):
        assert torch.equal(one, other)
    else:
        assert one == other


@pytest.fixture
def several_concepts(photos, tiny_judges, tmp_path) -> tuple[str, ...]:
    """Flags of a run that learns two, each with a token, a class, repeats and a prior of its own or none."""
    dogs = tmp_path / "dogs"
    dogs.mkdir()
    for number in (1, 2):
        shutil.copy(photos / f"{number}.png", dogs)
    concepts = [
        {"data": str(photos), "token": "sks", "class_name": "ball"},
        {"data": str(dogs), "token": "oue", "class_name": "dog", "repeats": 2, "class_images": 0},
    ]
    nulls = ("--data=null", "--subject.token=null", "--subject.class_name=null")
    return (f"--concepts={json.dumps(concepts)}", *nulls, f"--watch.vision={tiny_judges['dino']}")


@pytest.mark.parametrize("kind", ["sd", "sdxl"])
def test_a_resumed_run_is_an_unbroken_one(train, resume, several_concepts, tiny_bases, tmp_path, kind):
    flags = (*EVERYTHING, *(several_concepts if kind == "sd" else (UNSEEN,)))
    assert train(tiny_bases[kind], "unbroken", *flags, steps=4).code == 0
    assert train(tiny_bases[kind], "resumed", *flags, steps=2).code == 0
    outcome = resume("resumed", "--training.steps=4")
    assert outcome.code == 0, outcome.err
    assert "going on at update 2" in outcome.out
    assert_equal(checkpoint(tmp_path / "resumed", 4), checkpoint(tmp_path / "unbroken", 4))
    if kind == "sd":
        lines = (tmp_path / "resumed" / "evaluations.jsonl").read_text().splitlines()
        records = [json.loads(line) for line in lines]
        assert [record["step"] for record in records] == [0, 2, 4]
        assert all("held_out_loss" in record for record in records)
        assert records[-1]["protocol"]["prompts"] == ["a sks ball", "a oue dog"]
        likeness = [records[-1]["concepts"][token]["likeness"]["mean"] for token in ("sks", "oue")]
        assert likeness == pytest.approx(records[-1]["values"]["likeness"])
        outcome = resume("unbroken", '--concepts=[{"data": "dogs", "class_name": "dog"}]')
        assert outcome.is_one_clear_line()
        assert "cannot change concepts" in outcome.err


@pytest.fixture
def interrupted_at(monkeypatch):
    """Calls something instead of an update, once."""
    step = Trainer.train_step

    def at(number: int, interrupt) -> None:
        def interrupting(trainer):
            if trainer.step == number:
                monkeypatch.setattr(Trainer, "train_step", step)
                interrupt()
            return step(trainer)

        monkeypatch.setattr(Trainer, "train_step", interrupting)

    return at


def lines_of(run: Path) -> list[dict]:
    """The record of a run, but for the clock."""
    lines = (run / "metrics.jsonl").read_text().splitlines()
    return [{**json.loads(line), "images_per_second": None} for line in lines]


def be_killed() -> None:
    """A kill is an exception that nothing answers."""
    raise KeyboardInterrupt


def test_every_line_of_the_record_is_that_of_an_unbroken_run(train, resume, tiny_bases, tmp_path, interrupted_at):
    flags = ("--training.log_every=3", "--training.save_every=2", UNSEEN)
    assert train(tiny_bases["sd"], "unbroken", *flags, steps=7).code == 0
    interrupts = {
        "killed": be_killed,
        "interrupted": lambda: signal.raise_signal(signal.SIGINT),
        "stopped": lambda: signal.raise_signal(signal.SIGTERM),
    }
    for name, interrupt in interrupts.items():
        interrupted_at(5, interrupt)
        outcome = train(tiny_bases["sd"], name, *flags, steps=7)
        assert outcome.code == 130
        if name != "killed":
            assert f"go on with: python personalize.py train --resume {tmp_path / name}" in outcome.out
            assert RunDirectory(tmp_path / name).latest_checkpoint().name == "step_0000006.pt"
    assert_equal(checkpoint(tmp_path / "stopped", 6), checkpoint(tmp_path / "interrupted", 6))
    assert lines_of(tmp_path / "stopped") == lines_of(tmp_path / "interrupted")
    for name in ("killed", "interrupted"):
        assert resume(name).code == 0
        assert lines_of(tmp_path / name) == lines_of(tmp_path / "unbroken")
    assert [record["step"] for record in lines_of(tmp_path / "unbroken")] == [3, 6, 7]


def test_a_second_process_is_refused_and_what_would_change_the_result(train, resume, tiny_bases, tmp_path):
    begun = train(tiny_bases["sd"], "run", UNSEEN, steps=1)
    assert "arithmetic: float32, for there is no GPU" in begun.out
    assert "\n  precision: float32\n" in (tmp_path / "run" / "config.yaml").read_text()
    outcome = resume("run", "--adapter.rank=4")
    assert outcome.is_one_clear_line()
    assert "cannot change adapter.rank from 8 to 4" in outcome.err
    with RunDirectory(tmp_path / "run").held():
        for outcome in (
            train(tiny_bases["sd"], "run"),
            resume("run", "--training.steps=2"),
        ):
            assert outcome.is_one_clear_line(), outcome.err
            assert f"another process trains in {tmp_path / 'run'}" in outcome.err


def test_a_rate_that_has_fallen_does_not_rise_again(train, resume, tiny_bases):
    assert train(tiny_bases["sd"], "run", UNSEEN, "--training.lr_schedule=cosine", steps=2).code == 0
    outcome = resume("run", "--training.steps=4")
    assert outcome.is_one_clear_line(), outcome.err
    assert "turn back to a checkpoint of at most 1 steps" in outcome.err
    outcome = resume("run", "--training.steps=1")
    assert outcome.is_one_clear_line(), outcome.err
    assert "has taken 2 steps already" in outcome.err


def test_killed_in_the_middle_it_goes_on(
    train, train_arguments, resume, start_script, forget_accelerator, tiny_bases, tmp_path
):
    arguments = (tiny_bases["sd"], "killed", *EVERYTHING, UNSEEN)
    forget_accelerator()
    started = start_script(*train_arguments(*arguments, steps=1000))
    started.wait_for((tmp_path / "killed" / "checkpoints" / "latest").is_file)
    assert started.send(signal.SIGKILL).code == -signal.SIGKILL
    steps = 2 + int(RunDirectory(tmp_path / "killed").latest_checkpoint().stem.removeprefix("step_"))
    assert resume("killed", f"--training.steps={steps}").code == 0
    assert train(tiny_bases["sd"], "unbroken", *EVERYTHING, UNSEEN, steps=steps).code == 0
    assert_equal(checkpoint(tmp_path / "killed", steps), checkpoint(tmp_path / "unbroken", steps))


def test_an_update_that_is_not_sound_changes_nothing(train, resume, tiny_bases, tmp_path, monkeypatch):
    """A gradient overflows at the update at whose end a checkpoint is due: the run stops, and can go on before it."""
    clip = Trainer._share_gradients

    def overflow(trainer, parameters):
        clip(trainer, parameters)
        if trainer.step == 3:
            parameters[0].grad[0] = float("inf")

    monkeypatch.setattr(Trainer, "_share_gradients", overflow)
    outcome = train(tiny_bases["sd"], "run", "--training.save_every=2", UNSEEN, steps=5)
    assert outcome.code == 2
    assert "by update 4 the loss or its gradient is not finite; the last checkpoint is of step 2" in outcome.err
    monkeypatch.setattr(Trainer, "_share_gradients", clip)
    assert resume("run").code == 0
    assert all(weight.isfinite().all() for weight in checkpoint(tmp_path / "run", 5)["model"].values())


def test_two_processes_are_one_that_accumulates(
    train, train_arguments, resume, finish_script, forget_accelerator, tiny_bases, tmp_path
):
    """As many micro-batches an update, in two processes or one after the other: the same weights, up to rounding; also
    after a resume at an update at which there was a look, and after one in a single process."""
    flags = ("--train_text_encoder=true", "--prior.images=2", "--prior.steps=2", "--training.lr=1e-2")
    assert train(tiny_bases["sd"], "one", *flags, "--training.accumulation=4", UNSEEN, steps=4).code == 0
    forget_accelerator()  # or the forks would know that there is one process
    finish_script(*train_arguments(tiny_bases["sd"], "two", *flags, "--training.accumulation=2"), processes=2)
    again = ("personalize.py", "train", f"--resume={tmp_path / 'two'}", "--training.steps=3")
    finish_script(*again, processes=2)
    outcome = resume("two", "--training.steps=4")
    assert outcome.is_one_clear_line(), outcome.err
    assert "takes 4 micro-batches" in outcome.err
    assert "set training.accumulation to 4" in outcome.err
    outcome = resume("two", "--training.steps=4", "--training.accumulation=4")
    assert outcome.code == 0, outcome.err
    one, two = (checkpoint(tmp_path / name, 4) for name in ("one", "two"))
    assert (two["images_seen"], two["prior_seen"]) == (one["images_seen"], one["prior_seen"]) == (16, 16)
    for name, weight in one["model"].items():
        torch.testing.assert_close(two["model"][name], weight, rtol=1e-3, atol=1e-4)
