"""A step as it has to be for a GPU: one function to compile, without a wait, and with nothing in it that a CUDA graph
would freeze. Here a recording of PyTorch's operations stands in for the graph."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from improved_diffusion.config import TrainingConfig
from improved_diffusion.models import group_norm
from improved_diffusion.runtime.devices import Processes
from improved_diffusion.training import trainer
from improved_diffusion.training.cuda_graph import obstacle_to_capture

aten = torch.ops.aten
# What on a GPU would copy to the host, or make a tensor whose size the host has to know.
WAITING = {
    *(aten._local_scalar_dense, aten.nonzero, aten.masked_select, aten.is_nonzero, aten.equal, aten.bincount),
    *(aten._unique2, aten.unique_consecutive, aten.repeat_interleave),
}
KINDS = [
    ["--loss=mse", "--model.dropout=0"],
    ["--loss=hybrid", "--training.accumulation=2", "--training.ema_lengths=[0.1]"],
    ["--loss=vlb", "--diffusion.timesteps=3", "--training.grad_clip=null"],
    ["--loss=mse", "--diffusion.timesteps=null", "--diffusion.schedule=flow", "--diffusion.prediction=velocity"],
]
every_kind = pytest.mark.parametrize("flags", KINDS, ids=["mse", "hybrid", "vlb", "flow"])


class Waits(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        by_mask = any(isinstance(x, torch.Tensor) and x.dtype == torch.bool for x in tree_leaves(args[1:2]))
        indexes = func.overloadpacket in (aten.index, aten.index_put, aten.index_put_)
        if func.overloadpacket in WAITING or (indexes and by_mask):
            self.found.append(str(func))
        return func(*args, **(kwargs or {}))


class Recording(TorchDispatchMode):
    """A CUDA graph's semantics: the same operations on the same tensors, with the same numbers of Python's."""

    def __init__(self) -> None:
        super().__init__()
        self.operations: list[tuple] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.operations.append((func, args, kwargs or {}, out))
        return out

    def replay(self) -> None:
        with torch.no_grad():
            for func, args, kwargs, out in self.operations:
                for old, new in zip(tree_leaves(out), tree_leaves(func(*args, **kwargs)), strict=True):
                    if isinstance(old, torch.Tensor) and old.data_ptr() != new.data_ptr():
                        old.copy_(new)


class Stream:
    def wait_stream(self, other: Stream) -> None: ...


@pytest.fixture
def pretended_gpu(monkeypatch):
    """Lets a trainer of this CPU capture its steps. To be called with it before it trains."""
    trainers = []

    @contextlib.contextmanager
    def graph(recording: Recording, stream: Stream, capture_error_mode: str) -> Iterator[None]:
        # On a GPU nothing is computed, or drawn, while it is recorded.
        touched = [*(p.grad for p in trainers[-1].network.parameters()), trainers[-1].terms.sums]
        before = [x.clone() for x in touched]
        with torch.random.fork_rng(devices=[]), recording:
            yield
        torch._foreach_copy_(touched, before)

    monkeypatch.setattr(trainer, "obstacle_to_capture", lambda processes, training: None)
    for name, fake in {"Stream": Stream, "current_stream": Stream, "CUDAGraph": Recording, "graph": graph}.items():
        monkeypatch.setattr(torch.cuda, name, fake)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: contextlib.nullcontext())
    return trainers.append


def train(made: trainer.Trainer, steps: int) -> trainer.Trainer:
    batches = made.stream.batches(made.step)
    for _ in range(steps):
        made.train_step(*next(batches))
    return made


@every_kind
def test_no_step_waits_for_the_device(tiny_trainer, flags):
    made = train(tiny_trainer(*flags), 2)
    batches = made.stream.batches(2)
    with Waits() as waits:
        made.train_step(*next(batches))
    assert waits.found == []


@pytest.fixture
def nothing_in_c(monkeypatch):
    """What C computes cannot be recorded."""
    monkeypatch.setattr(group_norm, "_library", lambda x: None)


@every_kind
def test_a_captured_step_is_the_step(tiny_trainer, flags, pretended_gpu, nothing_in_c):
    expected = train(tiny_trainer(*flags), 7)
    captured = tiny_trainer(*flags, "--training.cuda_graph=true")
    pretended_gpu(captured)
    train(captured, 7)
    assert len(captured._run_backward.graph.operations) > 100
    for name, weights in expected.network.state_dict().items():
        torch.testing.assert_close(captured.network.state_dict()[name], weights, rtol=1e-4, atol=1e-6, msg=name)
    means, captured_means = (made.terms.flush(made.processes) for made in (expected, captured))
    assert captured_means == pytest.approx(means, rel=1e-4)


@pytest.mark.parametrize("flags", KINDS[1::2], ids=["hybrid", "flow"])
def test_what_is_compiled_is_one_graph(tiny_trainer, flags, monkeypatch):
    """`fullgraph` raises where Python would have to go on by itself; the backend leaves the operations as they are."""
    flags = [*flags, "--model.channel_multipliers=[1]", "--model.attention_resolutions=[]"]
    expected = train(tiny_trainer(*flags), 2)
    whole = functools.partial(torch.compile, backend="eager", fullgraph=True)
    monkeypatch.setattr(torch, "compile", whole)
    compiled = train(tiny_trainer(*flags, "--training.compile=true"), 2)
    gradients = {name: weights.grad for name, weights in expected.network.named_parameters()}
    # Not the weights: some gradients are 0 but for rounding, of which Adam makes steps as large as of any other.
    rounding = 1e-5 * max(float(gradient.abs().max()) for gradient in gradients.values())
    for name, weights in compiled.network.named_parameters():
        torch.testing.assert_close(weights.grad, gradients[name], rtol=1e-3, atol=rounding, msg=name)
    means, compiled_means = (made.terms.flush(made.processes) for made in (expected, compiled))
    assert compiled_means == pytest.approx(means, rel=1e-4)


def test_without_a_gpu_a_run_says_that_it_captures_nothing(run_script, tiny_config_file, tmp_path):
    flags = ["--training.cuda_graph=true", "--training.steps=1"]
    outcome = run_script("train.py", "--config", tiny_config_file, "--out", tmp_path / "run", *flags)
    assert outcome.code == 0, outcome.err
    assert "step: not in a CUDA graph, for there is no GPU" in outcome.out
    resumed = run_script("train.py", "--resume", tmp_path / "run", "--training.steps=2", "--training.cuda_graph=false")
    assert resumed.code == 0, resumed.err
    assert "CUDA graph" not in resumed.out
    gpu = torch.device("cuda", 0)
    assert obstacle_to_capture(Processes(gpu), TrainingConfig()) is None
    assert "several processes" in obstacle_to_capture(Processes(gpu, 0, 2), TrainingConfig())
    assert "checkpointing" in obstacle_to_capture(Processes(gpu), TrainingConfig(gradient_checkpointing=True))
