"""Training on many devices: `python benchmarks/scaling.py [--num-channels 32] [--batch-size 16] [--steps 5]`.

First it is measured: images/s of two processes with one thread each, which divide a batch, against one such process
that has it whole, and how far their gradients are apart. The two take turns, and each has the machine to itself.

Then it is reckoned for nodes of eight GPUs, by the formulas of docs/scaling.md, from the network's FLOPs and bytes and
from what is assumed of a GPU (flags): the UNet of Food101, in bfloat16, with gradients that travel in float32.
"""

from __future__ import annotations

import argparse
import statistics
import time
from datetime import timedelta
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing
from random_run import ALONE, CLASSES, make_trainer, random_run
from torch.utils.flop_counter import FlopCounterMode

from improved_diffusion.models.build import build_network
from improved_diffusion.runtime.devices import Processes, use_huge_pages

GPUS_OF_A_NODE = 8


def measure(rank: int, options: argparse.Namespace, meeting: str) -> None:
    """One of the two processes; the first prints."""
    torch.set_num_threads(1)
    store = dist.FileStore(meeting, 2)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=2, timeout=timedelta(hours=1))
    config = random_run(options.num_channels, options.batch_size)
    both = make_trainer(config, Processes(torch.device("cpu"), rank, 2))
    alone = make_trainer(config, ALONE)
    trainers = {"one process": alone, "two processes": both}
    seconds: dict[str, list[float]] = {name: [] for name in trainers}
    for step in range(options.steps + 1):
        for name, trainer in trainers.items():
            dist.barrier()
            if trainer is both or rank == 0:
                batch = trainer.stream.batch(step)
                start = time.perf_counter()
                trainer.train_step(*batch)
                seconds[name].append(time.perf_counter() - start)
        if step == 0 and rank == 0:
            gradients = [torch.cat([p.grad.flatten() for p in t.network.parameters()]) for t in trainers.values()]
            apart = (gradients[1] - gradients[0]).norm() / gradients[0].norm()
    dist.barrier()
    if rank == 0:
        # Of the first step, which allocates, nothing counts.
        rates = {name: options.batch_size / statistics.median(times[1:]) for name, times in seconds.items()}
        print(f"UNet of {options.num_channels} channels, {options.batch_size} images a step, a thread for each process")
        for name, rate in rates.items():
            print(f"{name:<24}{rate:>10.2f} images/s")
        print(f"{'ratio':<24}{rates['two processes'] / rates['one process']:>10.2f}")
        print(f"{'gradients apart by':<24}{apart:>10.1e} of their norm")
    dist.destroy_process_group()


def count() -> tuple[int, int, int]:
    """Of the UNet of Food101: FLOPs of a forward and backward pass for an image, parameters, and bytes of an image."""
    model = random_run(128, 1).model
    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        network = build_network(random_run(128, 1), CLASSES)
        y = torch.zeros(1, dtype=torch.int64)
        network(torch.empty(1, *model.image_shape), torch.zeros(1), y).square().mean().backward()
    height, width = model.sides
    return counter.get_total_flops(), sum(p.numel() for p in network.parameters()), height * width * model.channels


def reckon(options: argparse.Namespace) -> None:
    flops, parameters, image_bytes = count()
    print(
        f"\nUNet of Food101: {flops / 1e9:.1f} GFLOP an image, {parameters / 1e6:.1f} M parameters; GPUs of "
        f"{options.peak:g} TFLOP/s used to {options.utilisation:.0%}, {options.inside:g} GB/s to each in a node and "
        f"{options.between:g} GB/s between nodes"
    )
    print("  GPUs  images a GPU  compute ms  all-reduce ms  exposed ms  efficiency   images/s  data MB/s  bottleneck")
    for gpus in (8, 64):
        for images in (8, 64, 256):
            compute = flops * images / (options.utilisation * options.peak * 1e12)
            bandwidth = options.inside if gpus <= GPUS_OF_A_NODE else options.between
            reduce = 2 * (gpus - 1) / gpus * 4 * parameters / (bandwidth * 1e9)
            exposed = max(0.0, reduce - compute * 2 / 3)  # the backward pass hides the rest
            rate = gpus * images / (compute + exposed)
            print(
                f"{gpus:6}{images:14}{1e3 * compute:12.1f}{1e3 * reduce:15.1f}{1e3 * exposed:12.1f}"
                f"{compute / (compute + exposed):12.0%}{rate:11,.0f}{rate * image_bytes / 1e6:11,.0f}"
                f"  {'network' if exposed else 'arithmetic'}"
            )
    print("\n  GPUs  memory of weights, gradients, moments and one average, GB: each whole, shard_optimizer")
    for gpus in (1, 8, 64):
        whole, divided = 4 * parameters * (3 + 3) / 1e9, 4 * parameters * (3 + 3 / gpus) / 1e9
        print(f"{gpus:6}{whole:10.2f}{divided:10.2f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--num-channels", type=int, default=32, help="channels at full resolution")
    parser.add_argument("--batch-size", type=int, default=16, help="images per step")
    parser.add_argument("--steps", type=int, default=5, help="timed, of each")
    parser.add_argument("--peak", type=float, default=989, help="bfloat16 TFLOP/s of a GPU (H100: 989)")
    parser.add_argument("--utilisation", type=float, default=0.4, help="share of the peak that a step reaches")
    parser.add_argument("--inside", type=float, default=450, help="GB/s of a GPU within its node (NVLink 4: 450)")
    parser.add_argument("--between", type=float, default=50, help="GB/s of a GPU between nodes (400 Gb/s: 50)")
    options = parser.parse_args()
    use_huge_pages()  # as training does
    with TemporaryDirectory() as folder:
        multiprocessing.spawn(measure, (options, str(Path(folder) / "meeting")), nprocs=2)
    reckon(options)


if __name__ == "__main__":
    main()
