"""`personalize.py train` on tiny random pipelines, through the command line."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

pytest.importorskip("diffusers")
pytest.importorskip("accelerate")
from accelerate.state import AcceleratorState  # noqa: E402

PROJECT = Path(__file__).parents[3]

FAST = ("--watch.clip=null", "--watch.vision=null", "--watch.steps=2", "--watch.every=100", "--watch.seeds=[0]")
SUBJECT = ("--subject.token=sks", "--subject.class_name=ball")
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


@pytest.fixture
def train(run_script, photos, tmp_path, monkeypatch):
    """Run `personalize.py train` on the photos; the run's directory is `tmp_path / name`."""
    monkeypatch.setenv("IMPROVED_DIFFUSION_CACHE", str(tmp_path / "cache"))

    def run(base: Path, name: str, *flags: str, steps: int = 2):
        AcceleratorState._reset_state(reset_partial_state=True)  # a process has one, and here runs several commands
        where = (f"--base={base}", f"--data={photos}", f"--out={tmp_path / name}")
        return run_script("personalize.py", "train", *where, *SUBJECT, *FAST, f"--training.steps={steps}", *flags)

    return run


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


METHODS = {
    "lora": ("--train_text_encoder=true", "--images.buckets=true", "--training.batch_size=2", "--prior.images=2"),
    "dora": (
        "--adapter.dora=true",
        "--adapter.targets=attention+feedforward",
        "--training.gradient_checkpointing=true",
    ),
    "full": ("--method=full", "--train_text_encoder=true"),
    "full, bf16": ("--method=full", "--training.precision=bf16"),
    "textual inversion, bf16": (
        "--method=textual_inversion",
        "--subject.token=<ball>",
        "--subject.vectors=2",
        "--training.precision=bf16",
    ),
}
ALL = [(kind, method) for kind in ("sd", "sdxl") for method in METHODS]


@pytest.mark.parametrize(("kind", "method"), [*ALL, ("sd2", "lora"), ("sd2", "textual inversion, bf16")])
def test_two_steps_of_each_method_and_the_export_of_what_they_learned(
    train, run_script, tiny_bases, tmp_path, kind, method
):
    outcome = train(tiny_bases[kind], "run", "--prior.steps=2", *METHODS[method])
    assert outcome.code == 0, outcome.err
    run = tmp_path / "run"
    planned = re.search(r"epochs: (.*)", outcome.out).group(1)
    assert re.search(r"done: (.*)", outcome.out).group(1) == planned
    assert (run / "samples" / "step_0000002.png").is_file()
    losses = [json.loads(line)["loss"] for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert np.isfinite(losses).all()
    exported = run_script("personalize.py", "export", f"--run={run}", f"--out={tmp_path / 'exported'}")
    assert exported.code == 0, exported.err
    assert "largest difference of a pixel: 0" in exported.out


@pytest.mark.parametrize("kind", ["sd", "sdxl"])
def test_a_resumed_run_is_an_unbroken_one(train, run_script, tiny_bases, tmp_path, kind):
    assert train(tiny_bases[kind], "unbroken", *EVERYTHING, steps=4).code == 0
    assert train(tiny_bases[kind], "resumed", *EVERYTHING, steps=2).code == 0
    outcome = run_script("personalize.py", "train", f"--resume={tmp_path / 'resumed'}", "--training.steps=4")
    assert outcome.code == 0, outcome.err
    assert "going on at update 2" in outcome.out
    assert_equal(checkpoint(tmp_path / "resumed", 4), checkpoint(tmp_path / "unbroken", 4))
    records = [json.loads(line) for line in (tmp_path / "resumed" / "evaluations.jsonl").read_text().splitlines()]
    assert [record["step"] for record in records] == [0, 2, 4]
    assert all("held_out_loss" in record for record in records)


@pytest.mark.parametrize("how", ["killed", "stopped"])
def test_every_line_of_the_record_is_that_of_an_unbroken_run(train, run_script, tiny_bases, tmp_path, monkeypatch, how):
    from improved_diffusion.personalize.training.trainer import Trainer

    flags = ("--training.log_every=3", "--training.save_every=2")
    assert train(tiny_bases["sd"], "unbroken", *flags, steps=7).code == 0
    step = Trainer.train_step

    def interrupting(trainer):
        if trainer.step == 5:
            monkeypatch.setattr(Trainer, "train_step", step)
            if how == "killed":
                raise KeyboardInterrupt
            signal.raise_signal(signal.SIGTERM)
        return step(trainer)

    monkeypatch.setattr(Trainer, "train_step", interrupting)
    assert train(tiny_bases["sd"], "broken", *flags, steps=7).code == 130
    AcceleratorState._reset_state(reset_partial_state=True)
    assert run_script("personalize.py", "train", f"--resume={tmp_path / 'broken'}").code == 0
    of_both = []
    for name in ("unbroken", "broken"):
        lines = (tmp_path / name / "metrics.jsonl").read_text().splitlines()
        of_both.append([{**json.loads(line), "images_per_second": None} for line in lines])
    assert [record["step"] for record in of_both[0]] == [3, 6, 7]
    assert of_both[0] == of_both[1]


def test_a_second_process_is_refused(train, run_script, tiny_bases, tmp_path):
    from improved_diffusion.run_directory import RunDirectory

    assert train(tiny_bases["sd"], "run", steps=1).code == 0
    with RunDirectory(tmp_path / "run").held():
        for outcome in (
            train(tiny_bases["sd"], "run"),
            run_script("personalize.py", "train", f"--resume={tmp_path / 'run'}", "--training.steps=2"),
        ):
            assert outcome.is_one_clear_line(), outcome.err
            assert f"another process trains in {tmp_path / 'run'}" in outcome.err


def test_killed_in_the_middle_it_goes_on(train, run_script, tiny_bases, photos, tmp_path):
    assert train(tiny_bases["sd"], "unbroken", *EVERYTHING, steps=30).code == 0
    killed = tmp_path / "killed"
    where = [f"--base={tiny_bases['sd']}", f"--data={photos}", f"--out={killed}"]
    command = [sys.executable, "personalize.py", "train", *where, *SUBJECT, *FAST, *EVERYTHING, "--training.steps=30"]
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    process = subprocess.Popen(command, cwd=PROJECT, env={**os.environ, "OMP_NUM_THREADS": "1"}, **quiet)
    deadline = time.monotonic() + 120
    while not (killed / "checkpoints" / "latest").is_file() and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (killed / "checkpoints" / "step_0000030.pt").exists()
    assert run_script("personalize.py", "train", f"--resume={killed}").code == 0
    assert_equal(checkpoint(killed, 30), checkpoint(tmp_path / "unbroken", 30))


def test_what_decides_the_result_cannot_change(train, run_script, tiny_bases, tmp_path):
    begun = train(tiny_bases["sd"], "run")
    assert "arithmetic: float32, for there is no GPU" in begun.out
    assert "\n  precision: float32\n" in (tmp_path / "run" / "config.yaml").read_text()
    outcome = run_script("personalize.py", "train", f"--resume={tmp_path / 'run'}", "--adapter.rank=4")
    assert outcome.is_one_clear_line()
    assert "cannot change adapter.rank from 8 to 4" in outcome.err


def test_a_loss_that_is_not_finite_stops_the_run(train, tiny_bases):
    outcome = train(tiny_bases["sd"], "run", "--training.lr=1e30", "--training.grad_clip=null", steps=9)
    assert outcome.code == 2
    assert re.search(r"error: the loss or its gradient at update \d is not finite; .* lower training.lr", outcome.err)


def test_an_update_that_is_not_sound_changes_nothing(train, run_script, tiny_bases, tmp_path, monkeypatch):
    """A gradient overflows at the update at whose end a checkpoint is due: the run stops, and can go on before it."""
    from improved_diffusion.personalize.training.trainer import Trainer

    clip = Trainer._share_gradients

    def overflow(trainer, parameters):
        clip(trainer, parameters)
        if trainer.step == 3:
            parameters[0].grad[0] = float("inf")

    monkeypatch.setattr(Trainer, "_share_gradients", overflow)
    outcome = train(tiny_bases["sd"], "run", "--training.save_every=2", steps=8)
    assert outcome.code == 2
    assert "at update 4 is not finite; the last checkpoint is of step 2" in outcome.err
    monkeypatch.setattr(Trainer, "_share_gradients", clip)
    assert run_script("personalize.py", "train", f"--resume={tmp_path / 'run'}").code == 0
    assert all(weight.isfinite().all() for weight in checkpoint(tmp_path / "run", 8)["model"].values())


def test_pictures_of_one_colour_stop_the_run(train, tiny_bases, tmp_path):
    from improved_diffusion.personalize.models.base import load_base

    base = load_base(str(tiny_bases["sd"]))
    torch.nn.init.zeros_(base.pipeline.vae.decoder.conv_out.weight)
    torch.nn.init.zeros_(base.pipeline.vae.decoder.conv_out.bias)
    base.pipeline.save_pretrained(tmp_path / "broken")
    outcome = train(tmp_path / "broken", "run")
    assert outcome.code == 2
    assert "error: at step 0 the model draws pictures of one colour (128, 128, 128)" in outcome.err


def test_copying_is_noticed_and_the_choice_precedes_it(train, tiny_bases, photos, tmp_path, monkeypatch):
    """From update 3 on the sampler returns training images, as a model that has learned them by heart would."""
    from improved_diffusion.personalize.data.captioned import open_captioned_set
    from improved_diffusion.personalize.data.crops import fit
    from improved_diffusion.personalize.models.encoding import rendered
    from improved_diffusion.personalize.training import watch

    images = [image.load() for image in open_captioned_set(photos).images]
    looks = []

    def draw(base, prompts, seeds, sampling, batch_size):
        looks.append(prompts)
        if len(looks) <= 3:  # of the base, and of updates 1 and 2
            return draw_really(base, prompts, seeds, sampling, batch_size)
        return [rendered(base, fit(images[seed], (64, 64))[0]) for seed in seeds]

    draw_really = watch.draw
    monkeypatch.setattr(watch, "draw", lambda base, prompts, *rest: draw(base, prompts, *rest) if prompts else [])
    vision = ("--watch.vision=inception", "--watch.every=1", "--watch.seeds=[0,1,2]", "--images.resolution=64")
    prompts = ('--watch.prompts=["a {token} {class}"]', "--watch.class_prompts=[]")
    outcome = train(tiny_bases["sd"], "run", *vision, *prompts, steps=4)
    assert outcome.code == 0, outcome.err
    warnings = [line for line in outcome.out.splitlines() if line.startswith("warning: step")]
    assert [line.split(":")[1].strip() for line in warnings] == ["step 3", "step 4"]
    chosen = (tmp_path / "run" / "checkpoints" / "best").read_text().strip()
    assert chosen in ("step_0000001.pt", "step_0000002.pt")
    assert all(f"the best checkpoint is that of step {int(chosen[5:12])}" in line for line in warnings)
    records = [json.loads(line) for line in (tmp_path / "run" / "evaluations.jsonl").read_text().splitlines()]
    assert [record["scores"]["copying"]["mean"] > 0.9 for record in records] == [False, False, False, True, True]


def records_of(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "evaluations.jsonl").read_text().splitlines()]


def test_other_looks_on_a_resume_are_a_new_series(train, run_script, tiny_bases, tmp_path):
    """What hardly learns has hardly moved from the base, on any seeds; and scores of other pictures choose nothing."""
    run = tmp_path / "run"
    looks = ("--watch.vision=inception", "--watch.every=1", "--images.resolution=64", "--training.keep_checkpoints=1")
    prompts = ('--watch.prompts=["a {token} {class}"]', '--watch.class_prompts=["a {class}"]')
    assert train(tiny_bases["sd"], "run", *looks, *prompts, "--training.lr=1e-9").code == 0
    best = (run / "checkpoints" / "best").read_text().strip()
    outcome = run_script("personalize.py", "train", f"--resume={run}", "--training.steps=3", "--watch.seeds=[7,8]")
    assert outcome.code == 0, outcome.err
    assert "looks: a new series, not compared with the last one (other seeds)" in outcome.out
    records = records_of(run)
    assert [(record["step"], record["protocol"]["seeds"]) for record in records] == [
        *((step, [0]) for step in (0, 1, 2)),
        *((step, [7, 8]) for step in (2, 3)),  # the one of the checkpoint that it goes on from is looked at again
    ]
    assert all(max(record["values"]["drift"]) < 1e-3 for record in records)
    assert (run / "checkpoints" / "best").read_text().strip() in ("step_0000002.pt", "step_0000003.pt")
    assert (run / "checkpoints" / best).is_file()

    again = run_script("personalize.py", "train", f"--resume={run}", "--training.steps=4")
    assert again.code == 0, again.err
    assert "series" not in again.out
    assert len(records_of(run)) == 6


def test_any_other_looks_can_be_taken_up(train, run_script, tiny_bases, tiny_judges, tmp_path):
    looks = ("--watch.vision=inception", "--watch.every=1", "--images.resolution=64", '--watch.prompts=["a {token}"]')
    assert train(tiny_bases["sd"], "run", *looks, steps=1).code == 0
    changes = ("--watch.class_prompts=[]", f"--watch.clip={tiny_judges['clip']}", "--watch.vision=null")
    for step, change in enumerate(changes, start=2):
        flags = (f"--training.steps={step}", change)
        outcome = run_script("personalize.py", "train", f"--resume={tmp_path / 'run'}", *flags)
        assert outcome.code == 0, outcome.err
        assert "a new series" in outcome.out
    assert [record["step"] for record in records_of(tmp_path / "run")] == [0, 1, 1, 2, 2, 3, 3, 4]


def test_what_was_skipped_is_said(train, tiny_bases, photos, tmp_path):
    folder = tmp_path / "mixed"
    folder.mkdir()
    for file in photos.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    (folder / "broken.jpg").write_bytes((photos / "0.png").read_bytes()[:40])
    (folder / "manual.pdf").write_bytes(b"%PDF-1.4")
    Image.new("RGBA", (64, 64), (255, 0, 0, 0)).save(folder / "sticker.png")
    outcome = train(tiny_bases["sd"], "run", f"--data={folder}")
    assert outcome.code == 0, outcome.err
    assert "skipped broken.jpg: " in outcome.out
    assert "skipped manual.pdf: not an image" in outcome.out
    assert "budget: 6 images" in outcome.out


@pytest.fixture(scope="module")
def mistaken_data(photos, tmp_path_factory) -> Path:
    """What people give in place of a folder of photos, and a parquet file in which a caption is missing."""
    import pyarrow
    import pyarrow.parquet

    places = tmp_path_factory.mktemp("mistaken")
    (places / "empty").mkdir()
    shutil.make_archive(str(places / "photos"), "zip", photos)
    shutil.copy(photos / "0.png", places / "a.png")
    images = [(photos / f"{number}.png").read_bytes() for number in range(2)]
    pyarrow.parquet.write_table(pyarrow.table({"image": images, "text": ["a ball", None]}), places / "a.parquet")
    return places


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--data=nowhere",), "there is no folder or parquet file of images at nowhere"),
        (("--data={places}/empty",), "no usable images in"),
        (("--data={places}/photos.zip",), "it is a zip archive: unpack it, and give the folder"),
        (("--data={places}/a.png",), "it is a single picture: give the folder that holds it"),
        (("--data={places}/a.parquet", "--subject.token=null"), "fill in the caption of its row"),
        (("--images.caption_column=en",), "leave out images.caption_column"),
        (("--training.steps=1.5",), "training.steps must be a whole number or null, not 1.5"),
        (("--base=models/dog.safetensors",), "models/dog.safetensors does not exist; give a folder"),
        (("--subject.token=null",), "have no caption, the first is 1.png: write 1.txt beside it"),
        (("--base=nowhere",), "the base model nowhere does not exist"),
        (("--subject.token=zwx",), "the token 'zwx' splits into"),
        (("--adapter.rank=0",), "adapter.rank must be at least 1, not 0"),
        (("--training.steps=null",), "how long to train? give training.steps"),
        (("--training.precision=fp16",), "training.precision fp16 needs a CUDA device"),
        (("--training.adam_8bit=true",), "training.adam_8bit needs a CUDA device"),
        (("--base_bits=4",), "base_bits 4 needs a CUDA device"),
        (("--training.epochs=3",), "both given: set one of them to null"),
        (("--watch.loss_timesteps=[1000]",), "watch.loss_timesteps must be below 1000"),
        (("--seed=99999999999999999999",), "seed must be a finite number, and a whole one below 2^63"),
        (("--subject.prompt=a {token.x}",), "cannot be filled in"),
        (("--method=textual_inversion",), "knows 'sks' already"),
        (("--watch.clip=nowhere",), "the CLIP model nowhere does not exist"),
        (('--watch.prompts=["a {colour} ball"]',), "only {token} and {class} can be filled in"),
        (("--images.background=mauvish",), "background 'mauvish' is no colour"),
        (("--images.held_out=5",), "images.held_out is 5, and there are 5 images"),
        (("--trainin.lr=1",), "trainin.lr"),
        (("--config=nowhere.yaml",), "no config at nowhere.yaml"),
    ],
    ids=lambda value: value[0] if isinstance(value, tuple) else "",
)
def test_mistakes_are_one_clear_line(train, tiny_bases, mistaken_data, flags, message):
    outcome = train(tiny_bases["sd"], "run", *(flag.replace("{places}", str(mistaken_data)) for flag in flags))
    assert outcome.is_one_clear_line(), outcome.err
    assert message in outcome.err


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--subject.token=zwx",), "the token 'zwx' splits into"),
        (("--method=textual_inversion",), "knows 'sks' already"),
    ],
    ids=["splits", "known"],
)
def test_a_token_that_will_not_do_is_refused_before_the_weights_are_read(
    train, tiny_bases, tmp_path, monkeypatch, flags, message
):
    from improved_diffusion.personalize.training import start

    monkeypatch.setattr(start, "load_base", lambda *_: pytest.fail("the weights were read"))
    outcome = train(tiny_bases["sdxl"], "run", *flags)
    assert outcome.is_one_clear_line(), outcome.err
    assert message in outcome.err


@pytest.mark.parametrize(
    ("out", "message"),
    [
        ("photos", "is among the images of"),
        ("photos/runs/dog", "is among the images of"),
        ("link", "is among the images of"),
        ("file", "is a file, and a run is a folder"),
        ("file/dog", "is a file, and a run is a folder"),
    ],
)
def test_a_place_that_will_not_do_is_refused_at_once(train, photos, tmp_path, monkeypatch, out, message):
    from improved_diffusion.personalize.training import start

    monkeypatch.setattr(start, "build", lambda *_: pytest.fail("the run was begun"))
    folder = shutil.copytree(photos, tmp_path / "photos")
    (tmp_path / "file").write_text("mine")
    (tmp_path / "link").symlink_to(folder)
    before = sorted(tmp_path.rglob("*"))
    outcome = train("nowhere", out, f"--data={folder}")
    assert outcome.is_one_clear_line(), outcome.err
    assert message in outcome.err
    assert sorted(tmp_path.rglob("*")) == before


def test_an_interrupt_saves(train, tiny_bases, photos, tmp_path):
    run = tmp_path / "run"
    where = [f"--base={tiny_bases['sd']}", f"--data={photos}", f"--out={run}"]
    command = [sys.executable, "personalize.py", "train", *where, *SUBJECT, *FAST, "--training.steps=100000"]
    process = subprocess.Popen(
        command, cwd=PROJECT, env={**os.environ, "OMP_NUM_THREADS": "1"}, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    deadline = time.monotonic() + 120
    while not (run / "metrics.jsonl").is_file() or not (run / "metrics.jsonl").read_text():
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130, err.decode()
    assert f"go on with: python personalize.py train --resume {run}" in out.decode()
    assert (run / "checkpoints" / "latest").is_file()


def test_a_gpu_too_small_is_said_before_anything_starts(train, tiny_bases, tmp_path, monkeypatch):
    """As on a GPU with 400 MB free; the comparison needs none."""
    from improved_diffusion.personalize.training import start

    monkeypatch.setattr(start, "free_memory", lambda device: 400_000_000)
    outcome = train(tiny_bases["sd"], "run", "--method=full")
    assert outcome.is_one_clear_line(), outcome.err
    needs = r"a training step needs about 5\d\d MB, a look at the run 5\d\d MB, and cpu has 400 MB free"
    assert re.search(needs + "; to need less: .*method lora", outcome.err)
    assert not (tmp_path / "run").exists()


def in_two_processes(*flags: str) -> None:
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    done = subprocess.run(
        [*torchrun, "personalize.py", "train", *flags],
        cwd=PROJECT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr


def test_two_processes_are_one_that_accumulates(train, run_script, tiny_bases, photos, tmp_path):
    """As many micro-batches an update, in two processes or one after the other: the same weights, up to rounding; also
    after a resume at an update at which there was a look, and after one in a single process."""
    flags = ("--train_text_encoder=true", "--prior.images=2", "--prior.steps=2", "--training.lr=1e-2")
    assert train(tiny_bases["sd"], "one", *flags, "--training.accumulation=4", steps=4).code == 0
    where = (f"--base={tiny_bases['sd']}", f"--data={photos}", f"--out={tmp_path / 'two'}")
    in_two_processes(*where, *SUBJECT, *FAST, *flags, "--training.accumulation=2", "--training.steps=2")
    in_two_processes(f"--resume={tmp_path / 'two'}", "--training.steps=3")
    AcceleratorState._reset_state(reset_partial_state=True)
    resume = ("personalize.py", "train", f"--resume={tmp_path / 'two'}", "--training.steps=4")
    outcome = run_script(*resume)
    assert outcome.is_one_clear_line(), outcome.err
    assert "takes 4 micro-batches" in outcome.err
    assert "set training.accumulation to 4" in outcome.err
    AcceleratorState._reset_state(reset_partial_state=True)
    outcome = run_script(*resume, "--training.accumulation=4")
    assert outcome.code == 0, outcome.err
    one, two = (checkpoint(tmp_path / name, 4) for name in ("one", "two"))
    assert (two["images_seen"], two["prior_seen"]) == (one["images_seen"], one["prior_seen"]) == (16, 16)
    for name, weight in one["model"].items():
        torch.testing.assert_close(two["model"][name], weight, rtol=1e-3, atol=1e-4)
