"""A function of tensors as a CUDA graph: all its kernels launched at once, instead of one by one from Python."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor

from improved_diffusion.runtime.devices import Processes

CALLS_BEFORE_CAPTURE = 3  # in which algorithms are chosen, code is compiled and gradients get their memory

Function = Callable[..., "Tensor | None"]


class CapturedFunction:
    """`function`, which gives a tensor or None: called as it is a few times, then recorded, and replayed from then on.

    A replay runs the recorded kernels on the recorded memory. The arguments, whose shapes never change, are copied to
    where the recording found them. Whatever else the function reads or writes must stay where it is: parameters,
    gradients (to be zeroed in place, never set to None), running sums. Python runs no more: a number of it stays what
    it was, and what is drawn follows the seed of the device's generator, which may be set before each call.
    """

    def __init__(self, function: Function):
        self.function = function
        self.calls = 0
        self.graph: torch.cuda.CUDAGraph | None = None

    def __call__(self, *arguments: Tensor) -> Tensor | None:
        if self.calls < CALLS_BEFORE_CAPTURE:
            self.calls += 1
            return self._beside(*arguments)
        if self.graph is None:
            self._capture(arguments)
        torch._foreach_copy_(self.arguments, list(arguments))
        self.graph.replay()
        return None if self.result is None else self.result.clone()  # its place is the next replay's too

    @functools.cached_property
    def stream(self) -> torch.cuda.Stream:
        """Where it runs before it is recorded, and is recorded: libraries and autograd remember on which stream they
        worked, and the default one cannot be recorded."""
        return torch.cuda.Stream()

    def _beside(self, *arguments: Tensor) -> Tensor | None:
        here = torch.cuda.current_stream()
        self.stream.wait_stream(here)
        with torch.cuda.stream(self.stream):
            result = self.function(*arguments)
        here.wait_stream(self.stream)
        return result

    def _capture(self, arguments: tuple[Tensor, ...]) -> None:
        self.arguments = [argument.clone() for argument in arguments]
        self.graph = torch.cuda.CUDAGraph()
        # Of this thread alone: those that prepare batches may go on with their copies.
        with torch.cuda.graph(self.graph, stream=self.stream, capture_error_mode="thread_local"):
            self.result = self.function(*self.arguments)


def obstacle_to_capture(processes: Processes) -> str | None:
    """Why a training step cannot be captured here, where it cannot."""
    if processes.device.type != "cuda":
        return "there is no GPU"
    return "several processes average their gradients within it" if processes.world_size > 1 else None
