"""The cut-out from its training to a file: it learns, goes on where it stopped, and cuts pictures of any size."""

from __future__ import annotations

import functools
import json
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from improved_diffusion.checkpoint_file import read_checkpoint
from improved_diffusion.errors import UserError
from improved_diffusion.stickers.matte import load_matter
from improved_diffusion.stickers.segment import load_cutout
from improved_diffusion.stickers.segment.commands import train as train_command
from improved_diffusion.stickers.segment.config import ModelConfig, SegmentConfig
from improved_diffusion.stickers.segment.loop import SegmentLoop
from improved_diffusion.stickers.segment.models import build_network, cutout_loss, sized_by_checkpoint
from tests.stickers.test_segment_data import write_set

TINY = {
    "segformer": (
        *("--model=segformer", "--model.widths=[8,8,16,16]", "--model.heads=[1,1,2,2]", "--model.depths=[1,1,1,1]"),
        "--model.decoder_width=8",
    ),
    "unet": ("--model=unet", "--model.widths=[8,16]", "--model.depths=[1,1]"),
}
TINY["patches in bf16"] = (*TINY["unet"], "--model.patch_size=2", "--training.precision=bf16")
FLAGS = (
    *("--image-size", 32, "--training.batch_size", 4, "--training.lr=0.01", "--training.warmup_steps=0"),
    *("--training.ema_rate=0.8", "--training.log_every=5", "--training.save_every=10", "--training.evaluate_every=100"),
)


def arguments(kind: str, icons: Path, out: Path) -> tuple[object, ...]:
    """Of the training of a tiny network."""
    return ("--data", icons, *TINY[kind], *FLAGS, "--out", out)


@pytest.fixture(scope="module")
def icons(tmp_path_factory) -> Path:
    return write_set(tmp_path_factory.mktemp("set") / "icons", [f"thing {number}" for number in range(40)])


@pytest.fixture(scope="module")
def whole(icons, tmp_path_factory) -> Callable[[str], Path]:
    """Gives an unbroken run of 20 steps of a kind, to be read only."""

    @functools.cache
    def trained(kind: str) -> Path:
        out = tmp_path_factory.mktemp(kind) / "whole"
        train_command.run([str(argument) for argument in (*arguments(kind, icons, out), "--steps", 20)])
        return out

    return trained


@pytest.fixture
def train(run_script, icons, tmp_path):
    """Train a tiny network; gives the folder of its run."""

    def train(kind: str, *flags: object, out: str = "run") -> Path:
        outcome = run_script("stickers.py", "segment", "train", *arguments(kind, icons, tmp_path / out), *flags)
        assert outcome.code in (0, 130), outcome.err
        return tmp_path / out

    return train


def noise(size: tuple[int, int]) -> Image.Image:
    return Image.effect_noise(size, 80).convert("RGB")


def metrics(run: Path) -> list[dict]:
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in one.items() if name != "images_per_second"} for one in records]


def weights(run: Path, step: int) -> dict:
    state = read_checkpoint(run / "checkpoints" / f"step_{step:07d}.pt")
    assert state["step"] == step
    return {**state["model"], **{f"ema {name}": value for name, value in state["ema"]["0.8"].items()}}


@pytest.mark.parametrize("kind", TINY)
def test_training_lowers_the_loss_and_a_stopped_run_goes_on_as_if_unbroken(kind, whole, train, run_script, monkeypatch):
    losses = [record["loss"] for record in metrics(whole(kind))]
    assert np.mean(losses[-2:]) < 0.9 * losses[0]

    save, stopped = SegmentLoop._log_metrics, []

    def log_and_interrupt(loop):
        shown = save(loop)
        if loop.trainer.step == 15 and not stopped:
            stopped.append(os.kill(os.getpid(), signal.SIGINT))
        return shown

    monkeypatch.setattr(SegmentLoop, "_log_metrics", log_and_interrupt)
    broken = train(kind, "--steps", 20, out="broken")
    assert [record["step"] for record in metrics(broken)] == [5, 10, 15]
    outcome = run_script("stickers.py", "segment", "train", "--resume", broken)
    assert outcome.code == 0, outcome.err
    assert metrics(broken) == metrics(whole(kind))
    expected, found = weights(whole(kind), 20), weights(broken, 20)
    assert expected.keys() == found.keys()
    assert all(torch.equal(expected[name], found[name]) for name in expected)


def test_a_resumed_run_goes_back_to_its_last_checkpoint_after_a_kill(whole, train, run_script, tmp_path, monkeypatch):
    class Killed(BaseException):
        pass

    def die(loop):
        if loop.trainer.step == 15:
            raise Killed
        return {}

    with monkeypatch.context() as patch:
        patch.setattr(SegmentLoop, "_log_metrics", die)
        with pytest.raises(Killed):
            train("unet", "--steps", 20, out="killed")
    run = tmp_path / "killed"
    assert run_script("stickers.py", "segment", "train", "--resume", run).code == 0
    expected, found = weights(whole("unet"), 20), weights(run, 20)
    assert all(torch.equal(value, found[name]) for name, value in expected.items())


def test_what_a_resumed_run_computes_cannot_be_changed_nor_its_pictures(train, run_script, icons, tmp_path):
    own = shutil.copytree(icons, tmp_path / "icons")
    run = train("unet", "--steps", 10, "--data", own)
    outcome = run_script("stickers.py", "segment", "train", "--resume", run, "--seed", 1)
    assert outcome.is_one_clear_line()
    assert "seed from 0 to 1" in outcome.err
    outcome = run_script("stickers.py", "segment", "train", "--resume", run, "--steps", 20)
    assert outcome.is_one_clear_line()
    assert "turn back to a checkpoint of at most 8 steps" in outcome.err  # the rate fell over the last three
    (own / "things" / "3.png").unlink()
    outcome = run_script("stickers.py", "segment", "train", "--resume", run)
    assert outcome.is_one_clear_line()
    assert "does not hold the pictures" in outcome.err


def test_a_run_is_measured_exported_and_loaded(train, run_script, icons, tmp_path):
    first = train("segformer", "--steps", 10, "--training.evaluate_every", 10, out="a")
    second = train("unet", "--steps", 10, out="b")
    (record,) = map(json.loads, (first / "evaluations.jsonl").read_text().splitlines())
    assert record["value"] == record["scores"]["IoU"]
    assert (first / "samples" / "step_0000010.png").is_file()

    other = write_set(tmp_path / "other", [f"thing {number}" for number in range(40)], "blue")
    sets = ("--data", icons, other, "--pictures", 3, "--out", tmp_path / "results")
    outcome = run_script("stickers.py", "segment", "evaluate", first, second, *sets)
    assert outcome.code == 0, outcome.err
    assert "| icons, held out | 3 | a |" in outcome.out
    assert "| other, unseen style | 3 | b |" in outcome.out
    scores = json.loads((tmp_path / "results" / "scores.json").read_text())["scores"]
    assert {(score["model"], score["pictures"], score["measure"]) for score in scores} == {
        (model, name, measure)
        for model in "ab"
        for name in ("icons", "other")
        for measure in ("IoU", "boundary F", "MAE", "SAD")
    }
    assert Image.open(tmp_path / "results" / "masks.png").size[0] > 4 * 32

    file = tmp_path / "shipped" / "cutout.safetensors"
    checkpoint = first / "checkpoints" / "step_0000010.pt"
    outcome = run_script("stickers.py", "segment", "export", checkpoint, "--out", file)
    assert outcome.code == 0, outcome.err
    cutout, exported, of_folder = load_cutout(checkpoint), load_cutout(file), load_matter(file.parent)
    assert np.array_equal(load_matter(first)(exact := noise((64, 48))), exported(exact))  # which the run has already
    assert exported.config == cutout.config
    assert exported.images_seen == cutout.images_seen == 40
    for size in ((32, 32), (100, 37), (5, 90), (1, 1)):
        picture = noise(size)
        alpha = cutout(picture)
        assert alpha.dtype == np.float32
        assert alpha.shape == size[::-1]
        assert 0 <= alpha.min() <= alpha.max() <= 1
        assert np.abs(alpha - exported(picture)).max() < 0.01
        assert np.array_equal(of_folder(picture), exported(picture))


def test_what_is_no_cutout_is_refused_in_one_line(run_script, tmp_path):
    for path in (tmp_path, tmp_path / "no.safetensors"):
        with pytest.raises(UserError):
            load_cutout(path)
    outcome = run_script("stickers.py", "segment", "train", "--out", tmp_path / "run")
    assert outcome.is_one_clear_line()
    assert "--data" in outcome.err
    assert not (tmp_path / "run").exists()
    outcome = run_script("stickers.py", "segment", "train", "--image-size", 40)
    assert outcome.is_one_clear_line()
    assert "multiple of 32" in outcome.err


def test_both_networks_are_of_one_size_and_give_logits_of_every_pixel():
    networks = [build_network(ModelConfig(kind=kind), 0) for kind in ("segformer", "unet")]
    counts = [sum(parameter.numel() for parameter in network.parameters()) for network in networks]
    assert abs(counts[0] / counts[1] - 1) < 0.01
    networks.append(build_network(ModelConfig(kind="unet", patch_size=2), 0))
    pictures = torch.zeros(1, 3, 64, 32, dtype=torch.uint8)
    assert all(network(pictures).shape == (1, 64, 32) for network in networks)


def test_the_loss_by_hand():
    """Logits 0 are p = 1/2: the cross-entropy is log 2; of 4 pixels, 1 of them true, the Dice term is
    1 - (2 * 1/2 + 1) / (4 * 1/4 + 1 + 1)."""
    alpha = torch.tensor([[[1.0, 0.0], [0.0, 0.0]]])
    terms = cutout_loss(torch.zeros(1, 2, 2), alpha)
    assert terms["bce"].item() == pytest.approx(np.log(2))
    assert terms["dice"].item() == pytest.approx(1 - 2 / 3)
    assert terms["loss"].item() == pytest.approx(np.log(2) + 1 / 3)


def test_a_segformer_starts_from_a_checkpoint(tmp_path):
    from transformers import SegformerConfig, SegformerForSemanticSegmentation

    sizes = {"hidden_sizes": [8, 8, 16, 16], "num_attention_heads": [1, 1, 2, 2], "depths": [1, 1, 1, 2]}
    published = SegformerForSemanticSegmentation(SegformerConfig(num_labels=5, decoder_hidden_size=8, **sizes))
    published.save_pretrained(tmp_path)
    model = sized_by_checkpoint(ModelConfig(checkpoint=str(tmp_path)))
    assert (model.widths, model.depths, model.decoder_width) == ((8, 8, 16, 16), (1, 1, 1, 2), 8)
    network = build_network(model, 0, pretrained=True).body.network
    before, after = published.state_dict(), network.state_dict()
    differ = {
        name for name in before if before[name].shape != after[name].shape or not torch.equal(before[name], after[name])
    }
    assert differ == {"decode_head.classifier.weight", "decode_head.classifier.bias"}  # of another number of labels
    with pytest.raises(UserError, match="cannot read a SegFormer"):
        sized_by_checkpoint(ModelConfig(checkpoint=str(tmp_path / "nothing")))


def test_settings_that_make_no_network_are_refused():
    for wrong in ({"widths": (8, 8)}, {"depths": (0, 1, 1, 1)}, {"kind": "unet", "checkpoint": "x"}, {"patch_size": 2}):
        with pytest.raises(UserError, match="model"):
            ModelConfig(**wrong)
    with pytest.raises(UserError, match="make no network"):
        build_network(ModelConfig(heads=(3, 3, 3, 3)), 0)
    with pytest.raises(UserError, match="multiple of 16"):
        SegmentConfig(image_size=40, model=ModelConfig(kind="unet"))
    with pytest.raises(UserError, match="multiple of 32"):
        SegmentConfig(image_size=48, model=ModelConfig(kind="unet", patch_size=2))
