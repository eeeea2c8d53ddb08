"""What one training step computes, however it is divided."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed.run
from PIL import Image
from torch.utils._python_dispatch import TorchDispatchMode

from improved_diffusion.diffusion.objective import LossTerms
from improved_diffusion.diffusion.schedule import cosine_schedule
from improved_diffusion.errors import UserError
from improved_diffusion.files import read_jsonl
from improved_diffusion.run_directory import RunDirectory
from improved_diffusion.runtime.devices import Processes
from improved_diffusion.training.running_terms import RunningTerms

CPU = Processes(torch.device("cpu"))
PROJECT = Path(__file__).parents[2]


def gradients_of_first_step(trainer) -> dict[str, torch.Tensor]:
    # The last convolutions are zero at first, which would leave most gradients zero too.
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in trainer.network.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    trainer.train_step(*trainer.stream.batch(0))
    return {name: parameter.grad for name, parameter in trainer.network.named_parameters()}


@pytest.mark.parametrize("loss", ["mse", "hybrid", "vlb"])
def test_accumulation_equals_the_full_batch(tiny_trainer, loss):
    flags = [f"--loss={loss}", "--model.dropout=0", "--training.grad_clip=null", "--training.batch_size=8"]
    flags += ["--training.augment=0.5"]
    whole = gradients_of_first_step(tiny_trainer(*flags))
    parts = gradients_of_first_step(tiny_trainer(*flags, "--training.accumulation=4"))
    largest = max(float(gradient.abs().max()) for gradient in whole.values())
    for name, gradient in whole.items():
        torch.testing.assert_close(parts[name], gradient, rtol=1e-4, atol=1e-6 * largest, msg=name)


def test_two_processes_give_the_loss_curve_of_one(run_script, finish_script, tiny_config_file, tmp_path):
    """As many parts of a batch, in two processes or one after the other: all that is drawn is the same, and the number
    of processes may change on the way. Here torchrun itself starts them."""
    curves, grids = [], []
    for processes in (1, 2):
        out = tmp_path / str(processes)
        flags = [f"--training.accumulation={4 // processes}", "--loss=vlb", "--diffusion.timesteps=4"]
        flags += ["--training.augment=0.5"]
        # 5 batches for one process, 4 for the other
        flags += ["--evaluation.grid_columns=3", "--sampling.batch_size=1"]
        flags += ["--training.save_every=5", f"--training.steps={9 if processes == 1 else 6}"]
        command = ["train.py", "--config", str(tiny_config_file), "--out", str(out), *flags]
        if processes == 1:
            assert run_script(*command).code == 0
        else:
            torchrun = [torch.distributed.run.__file__, "--standalone", "--nproc-per-node=2"]
            finish_script(*torchrun, "--start-method=fork", "--run-path", PROJECT / command[0], *command[1:])
            # Between two lines of the record: what both have counted of the next is not lost.
            checkpoint = out / "checkpoints" / "step_0000005.pt"
            outcome = run_script("train.py", "--resume", checkpoint, "--training.accumulation=4", "--training.steps=9")
            assert outcome.code == 0, outcome.err
        curves.append(read_jsonl(out / "metrics.jsonl"))
        grids.append(np.asarray(Image.open(out / "samples" / "step_0000009.png")).astype(int))
    assert [record["step"] for record in curves[0]] == [3, 6, 9]
    assert np.abs(grids[0] - grids[1]).mean() < 2  # of 255: the weights differ by rounding, and the images by more
    for one, two in zip(*curves, strict=True):
        assert one.keys() == two.keys()
        for name in one.keys() - {"images_per_second", "tflops"}:
            assert two[name] == pytest.approx(one[name], rel=1e-3), name


def test_augmented_images_are_trained_on_and_the_network_is_told(tiny_trainer):
    flags = ["--loss=mse", "--model.dropout=0", "--training.batch_size=16"]
    plain, augmented = tiny_trainer(*flags), tiny_trainer(*flags, "--training.augment=0.2")
    seen = []
    for trainer in (plain, augmented):
        trainer.network.register_forward_pre_hook(
            lambda _, given, named: seen.append((given[0], named.get("augmentation"))), with_kwargs=True
        )
    batch = plain.stream.batch(0)
    gradients = [gradients_of_first_step(trainer) for trainer in (plain, augmented)]
    (as_it_is, told_nothing), (moved, told) = seen
    assert torch.equal(plain.stream.batch(0)[0], batch[0])  # the images themselves stay
    assert told_nothing is None
    untouched = (told == 0).all(1)
    assert 0 < untouched.sum() < len(told)
    assert torch.equal(as_it_is[untouched], moved[untouched])
    assert not any(torch.equal(a, b) for a, b in zip(as_it_is[~untouched], moved[~untouched], strict=True))
    assert gradients[1]["augmentation_embedding.weight"].abs().sum() > 0
    assert "augmentation_embedding.weight" not in gradients[0]


class Casts(TorchDispatchMode):
    """Counts the casts of weights to bfloat16, and of their gradients back."""

    def __init__(self, network: torch.nn.Module):
        super().__init__()
        self.names = {parameter.data_ptr(): name for name, parameter in network.named_parameters()}
        self.weights: Counter[str] = Counter()
        self.back = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if func is torch.ops.aten._to_copy.default and args[0].dtype != out.dtype:
            if args[0].data_ptr() in self.names:
                self.weights[self.names[args[0].data_ptr()]] += 1
            self.back += args[0].dtype == torch.bfloat16 and args[0].dim() == 4 and args[0].shape[-1] in (1, 3)
        return out


def test_bfloat16_casts_each_weight_once_in_a_part_of_the_batch(tiny_trainer):
    small = ("--model.channel_multipliers=[1]", "--model.attention_resolutions=[]", "--training.batch_size=4")
    trainer = tiny_trainer("--training.precision=bf16", "--training.accumulation=2", *small)
    kernels = [name for name, weights in trainer.network.named_parameters() if weights.dim() == 4]
    with Casts(trainer.network) as casts:
        trainer.train_step(*trainer.stream.batch(0))
    assert set(casts.weights.values()) == {2}
    assert casts.weights.keys() >= set(kernels)
    assert casts.back == 2 * len(kernels)


def test_overfits_one_batch(tiny_trainer):
    small = ("--model.channel_multipliers=[1]", "--model.attention_resolutions=[]")
    trainer = tiny_trainer("--loss=mse", "--model.dropout=0", "--training.lr=3e-3", *small)
    images, classes = trainer.stream.batch(0)
    errors = []
    for _ in range(7):
        for _ in range(20):
            trainer.train_step(images, classes)
        errors.append(trainer.terms.flush(CPU)["mse"])
    assert errors[-1] < 0.35 * errors[0]


def test_a_loss_that_is_not_finite_stops_the_run_and_names_the_last_checkpoint(run_script, tiny_config_file, tmp_path):
    out = tmp_path / "run"
    first = run_script("train.py", "--config", tiny_config_file, "--out", out, "--training.steps=6")
    assert first.code == 0, first.err
    checkpoint = out / "checkpoints" / "step_0000006.pt"
    state = torch.load(checkpoint, weights_only=True)
    next(iter(state["model"].values())).fill_(float("nan"))
    torch.save(state, checkpoint)
    outcome = run_script("train.py", "--resume", out, "--training.steps=12")
    assert outcome.code == 2
    assert "not finite" in outcome.err
    assert str(checkpoint) in outcome.err
    assert not (out / "checkpoints" / "step_0000012.pt").exists()


def test_from_a_checkpoint_that_is_named_a_run_goes_on_at_another_rate(run_script, tiny_config_file, tmp_path):
    run, tamer = RunDirectory(tmp_path / "run"), ("--training.lr=1e-5", "--training.grad_clip=0.5")
    assert run_script("train.py", "--config", tiny_config_file, "--out", run.path, "--training.steps=3").code == 0
    assert "cannot change training.lr" in run_script("train.py", "--resume", run.path, *tamer).err
    outcome = run_script("train.py", "--resume", run.checkpoint_file(3), *tamer, "--training.steps=6")
    assert outcome.code == 0, outcome.err
    assert run_script("train.py", "--resume", run.path, "--training.steps=9").code == 0
    assert [record["lr"] for record in read_jsonl(run.metrics_file)] == [1e-3, 1e-5, 1e-5]


def test_a_batch_that_cannot_be_divided_is_refused(tiny_trainer):
    with pytest.raises(UserError, match="accumulation"):
        tiny_trainer("--training.batch_size=6", "--training.accumulation=4")


def test_the_images_must_have_the_size_that_the_model_expects(tiny_trainer):
    with pytest.raises(UserError, match="model.image_size 32"):
        tiny_trainer("--model.image_size=32")


class TestRunningTerms:
    def test_means_over_quartiles(self):
        generator = torch.Generator().manual_seed(0)
        terms, schedule = RunningTerms(CPU.device), cosine_schedule(8)
        t = torch.randint(7, (64,), generator=generator)
        mse = torch.rand(64, generator=generator)
        for part in (slice(0, 20), slice(20, 64)):
            terms.add(LossTerms(2 * mse[part], mse[part], None), schedule.at(t[part]), torch.ones(len(t[part])))
        means = terms.flush(CPU)
        for quartile in range(4):
            expected = np.mean(mse[(t == 2 * quartile) | (t == 2 * quartile + 1)].numpy())
            assert means[f"mse_q{quartile}"] == pytest.approx(expected)
        assert means["loss"] == pytest.approx(2 * means["mse"])
        assert means["mse"] == pytest.approx(float(mse.mean()))
        assert not any(name.startswith("vlb") for name in means)
        assert terms.flush(CPU) == {}

    def test_the_last_timestep_does_not_drown_the_curve(self):
        terms = RunningTerms(CPU.device)
        t = torch.arange(100)
        vlb = torch.full((100,), 0.02)
        vlb[99] = 721.0
        terms.add(LossTerms(1 + vlb, torch.ones(100), vlb), cosine_schedule(100).at(t), torch.ones(100))
        means = terms.flush(CPU)
        assert means["vlb"] == pytest.approx(0.02)
        assert means["vlb_q3"] == pytest.approx(0.02)
        assert means["loss"] == pytest.approx(1.02)
        assert means["vlb_last_step"] == pytest.approx(721.0)


def test_another_kind_of_network_than_the_file_of_settings_has(run_script, tiny_config_file, tmp_path):
    """What the file says of the size of its own kind is left out, and named."""
    size = ["--model.patch_size=4", "--model.width=16", "--model.depth=1", "--model.num_heads=2"]
    out = tmp_path / "run"
    outcome = run_script(
        *("train.py", "--config", tiny_config_file, "--model.kind=transformer", *size),
        *("--out", out, "--training.steps=1", "--evaluation.every=1", "--sampling.steps=1"),
    )
    assert outcome.code == 0, outcome.err
    assert re.search("another kind, without .*num_channels", outcome.out)
    config = RunDirectory(out).read_config()
    assert (config.model.kind, config.model.class_dropout, config.model.width) == ("transformer", 0.2, 16)
