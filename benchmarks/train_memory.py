"""Memory of a training step of the UNet: `python benchmarks/train_memory.py [--num-channels 16 32 64]`.

For each width: the tensors that stay (weights, two moments, one moving average), the most that there is of tensors in a
step without and with gradient checkpointing, and how much longer a step takes with it. Counted on the CPU in float32,
tensor by tensor, so that the bytes are the same on every machine; the two kinds of step take turns for the times.
"""

from __future__ import annotations

import argparse
import statistics
import time

from random_run import make_trainer, random_run

from improved_diffusion.personalize.training.emulation import LiveBytes
from improved_diffusion.training.trainer import Trainer


def bytes_that_stay(trainer: Trainer) -> int:
    tensors = list(trainer.network.parameters())
    tensors += [tensor for o in trainer.optimizers.values() for state in o.state.values() for tensor in state.values()]
    tensors += [tensor for average in trainer.ema.state_dict().values() for tensor in average.values()]
    return sum(tensor.nbytes for tensor in tensors)


def measure(num_channels: int, batch_size: int, repeats: int) -> None:
    """Print the line of a width."""
    trainers = [make_trainer(random_run(num_channels, batch_size, gradient_checkpointing=how)) for how in (False, True)]
    batch = trainers[0].stream.batch(0)
    peaks: list[int] = []
    seconds: list[list[float]] = [[], []]
    for trainer in trainers:
        trainer.train_step(*batch)  # makes the moments
        with LiveBytes() as live:
            trainer.train_step(*batch)
        peaks.append(live.peak)
    for _ in range(repeats):
        for trainer, times in zip(trainers, seconds, strict=True):
            start = time.perf_counter()
            trainer.train_step(*batch)
            times.append(time.perf_counter() - start)
    stay = bytes_that_stay(trainers[0])
    longer = statistics.median(seconds[1]) / statistics.median(seconds[0])
    kept, checkpointed = (stay + peak for peak in peaks)
    cells = "".join(f"{size / 1e6:14.1f}" for size in (stay, kept, checkpointed))
    print(f"{num_channels:8}{cells}{kept / checkpointed:10.2f}{longer:10.2f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--num-channels", type=int, nargs="+", default=[16, 32, 64], help="channels at full resolution")
    parser.add_argument("--batch-size", type=int, default=16, help="images per step")
    parser.add_argument("--repeats", type=int, default=3, help="timed steps of each")
    options = parser.parse_args()
    print(f"a training step on the CPU, float32, {options.batch_size} images of 64x64, MB")
    print("channels          stay      all kept  checkpointed     ratio      time")
    for num_channels in options.num_channels:
        measure(num_channels, options.batch_size, options.repeats)


if __name__ == "__main__":
    main()
