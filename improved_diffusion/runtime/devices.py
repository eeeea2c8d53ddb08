"""Which device to use, what it is fast at, and the processes that torchrun started."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from improved_diffusion.errors import UserError


@dataclass(frozen=True)
class Processes:
    """This process among those of the run: one, unless torchrun started more. `device` is this process's own."""

    device: torch.device
    rank: int = 0
    world_size: int = 1

    @property
    def is_first(self) -> bool:
        """Whether this process is the one that writes files and speaks."""
        return self.rank == 0

    def average(self, x: Tensor) -> Tensor:
        """The mean of `x` over the processes."""
        if self.world_size > 1:
            x = x.clone()
            dist.all_reduce(x)
            x /= self.world_size
        return x

    def total(self, x: Tensor) -> Tensor:
        """The sum of `x` over the processes."""
        return self.average(x) * self.world_size

    def any(self, flag: bool) -> bool:
        """Whether `flag` is set in any process."""
        return bool(self.total(torch.tensor(float(flag), device=self.device)) > 0) if self.world_size > 1 else flag

    def concatenate(self, x: Tensor) -> Tensor:
        """`x` of every process, in the order of their ranks, along the first dimension; all of one shape."""
        if self.world_size == 1:
            return x
        parts = [torch.empty_like(x) for _ in range(self.world_size)]
        dist.all_gather(parts, x.contiguous())
        return torch.cat(parts)

    def gather(self, value: object) -> list:
        """`value` of every process, in the order of their ranks."""
        if self.world_size == 1:
            return [value]
        values: list = [None] * self.world_size
        dist.all_gather_object(values, value)
        return values

    def gather_in_first(self, value: object) -> list | None:
        """`value` of every process, in the order of their ranks; None in all processes but the first."""
        if self.world_size == 1:
            return [value]
        values: list | None = [None] * self.world_size if self.is_first else None
        dist.gather_object(value, values)
        return values

    def broadcast(self, x: Tensor, source: int) -> Tensor:
        """`x` of the process `source`, written into this one's."""
        if self.world_size > 1:
            dist.broadcast(x, source)
        return x

    def wait(self) -> None:
        """Return once every process has come here."""
        if self.world_size > 1:
            dist.barrier()


def use_huge_pages() -> None:
    """Let PyTorch ask Linux for huge pages, before it allocates: page faults can be a quarter of a step on a CPU."""
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")


@contextlib.contextmanager
def start_processes() -> Iterator[Processes]:
    """Join the processes that torchrun started (nccl on GPUs, gloo on CPUs), or be the only one.

    Raises:
        UserError: torchrun started more processes than there are GPUs, or could not start them again.
    """
    use_huge_pages()
    _require_restarts_to_work()
    rank, local_rank, world_size = (int(os.environ.get(n, d)) for n, d in _TORCHRUN)
    device = torch.device("cuda", local_rank) if torch.cuda.is_available() else torch.device("cpu")
    if device.type == "cuda":
        if local_rank >= torch.cuda.device_count():
            raise UserError(f"torchrun started more processes than this machine's {torch.cuda.device_count()} GPU(s)")
        torch.cuda.set_device(device)
        torch.backends.cudnn.benchmark = True  # shapes stay the same: the fastest algorithm is worth finding
        # What is to be float32 is: PyTorch would take TF32, with 10 bits of mantissa, for convolutions.
        torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    if world_size == 1:
        yield Processes(device)
        return
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    try:
        yield Processes(device, rank, world_size)
    finally:
        dist.destroy_process_group()


def _require_restarts_to_work() -> None:
    """torchrun keeps the addresses of its processes over restarts, so that new ones would look for those that are gone.

    Raises:
        UserError: it may restart, and was not told to forget them.
    """
    restarts, keeps = os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0"), os.environ.get("TORCHELASTIC_USE_AGENT_STORE")
    if restarts != "0" and keeps == "True":
        raise UserError(
            "with --max-restarts torchrun needs TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 in its environment, or processes "
            "that are started again look for those that were lost: put it before torchrun"
        )


_TORCHRUN = (("RANK", 0), ("LOCAL_RANK", 0), ("WORLD_SIZE", 1))


def default_device() -> torch.device:
    """A GPU if there is one, or else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def usable_device(name: str | torch.device | None = None) -> torch.device:
    """The device of that name, or else `default_device`.

    Raises:
        UserError: it cannot be used here.
    """
    name = name or default_device()
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"--device {name} cannot be used here: {str(error).splitlines()[0]}") from error
    return torch.device(name)


def upload(x: Tensor, device: torch.device | str) -> Tensor:
    """`x`, which lies on the CPU or already on `device`, on `device`, without waiting for the work under way there."""
    from_cpu_to_gpu = x.device.type == "cpu" and torch.device(device).type == "cuda"
    return x.pin_memory().to(device, non_blocking=True) if from_cpu_to_gpu else x.to(device)


def bf16_hardware(device: torch.device) -> str | None:
    """What computes bfloat16 on `device`; None where float32 is faster, for bfloat16 would be emulated."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device) if torch.cuda.get_device_capability(device) >= (8, 0) else None
    if device.type != "cpu":
        return None
    # oneDNN, which computes convolutions and matrix products, can be told to leave newer instructions alone.
    limit = os.environ.get("ONEDNN_MAX_CPU_ISA", "ALL").upper()
    for name, is_there, limits in (
        ("AMX", torch.cpu._is_amx_tile_supported, ("ALL", "DEFAULT", "AMX")),
        ("AVX512-BF16", torch.cpu._is_avx512_bf16_supported, ("ALL", "DEFAULT", "AMX", "AVX10", "BF16", "FP16")),
    ):
        if is_there() and any(part in limit for part in limits):
            return name
    return None


def choose_precision(precision: str, device: torch.device) -> tuple[str, str]:
    """What the settings' `precision` means on `device`, and a line that says why.

    Of `auto` it makes bf16 or float32. Instruction sets decide, not a measurement, so that it is the same each time.
    """
    hardware = bf16_hardware(device)
    lacking = "this GPU is older than Ampere" if device.type == "cuda" else "there is neither AMX nor AVX512-BF16"
    if precision == "auto":
        return ("bf16", f"bf16, for there is {hardware}") if hardware else ("float32", f"float32, for {lacking}")
    emulated = f"; it is emulated and slow, for {lacking}" if precision == "bf16" and not hardware else ""
    return precision, f"{precision}, as the settings say{emulated}"


def sampling_precision(trained_in: str, device: torch.device) -> str:
    """In which a model of a run is drawn from on `device`: as it was trained, but in float32 where bf16 is emulated."""
    return "bf16" if trained_in != "float32" and bf16_hardware(device) else "float32"


def drawing_precision(device: torch.device) -> str:
    """In which published models are drawn from there: float32 on a CPU, else bf16 where it is fast, else fp16."""
    if device.type == "cpu":
        return "float32"
    return "bf16" if bf16_hardware(device) else "fp16"


def arithmetic(precision: str, device: torch.device) -> torch.dtype:
    """The type that the settings' `precision` (auto, bf16, float32) means on `device`."""
    return {"bf16": torch.bfloat16, "float32": torch.float32}[choose_precision(precision, device)[0]]


def with_autocast(network: Callable[..., Tensor], device: torch.device, dtype: torch.dtype) -> Callable[..., Tensor]:
    """`network` run under autocast to `dtype`; what is outside of it, the loss above all, stays float32."""

    def run(*inputs: Tensor | None, **conditions: Tensor) -> Tensor:
        with torch.autocast(device.type, dtype=dtype, enabled=dtype is not torch.float32):
            return network(*inputs, **conditions)

    return run
