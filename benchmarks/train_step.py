"""How fast one training step of the UNet is: `python benchmarks/train_step.py [--num-channels 64] [--compile]`.

A step is forward, backward, gradient clipping, AdamW and one moving average, on random images. On a CPU and on a GPU
alike, float32 in NCHW is compared with what training uses, bfloat16 in channels_last. The two take turns, so that other
work on the machine slows both, and the medians are printed.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from torch.nn.functional import mse_loss

from improved_diffusion.models.ema import EMA
from improved_diffusion.models.unet import UNet
from improved_diffusion.runtime.devices import use_huge_pages

FORMATS = {"float32 NCHW": torch.contiguous_format, "bfloat16 channels_last": torch.channels_last}


def make_step(options: argparse.Namespace, memory_format: torch.memory_format) -> Callable[[], None]:
    """A function that takes one training step and returns when it is done."""
    device = torch.device(options.device)
    bfloat16 = memory_format is torch.channels_last
    torch.manual_seed(0)
    n, size = options.batch_size, options.image_size
    network = UNet(image_size=size, num_channels=options.num_channels, num_classes=101)
    network.to(device, memory_format=memory_format)
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-4, fused=True)
    ema = EMA(dict(network.named_parameters()), rates=(0.9999,))
    x_t = torch.randn(n, 3, size, size, device=device).to(memory_format=memory_format)
    noise = torch.randn(n, 3, size, size, device=device)
    t = torch.randint(1000, (n,), device=device)
    y = torch.randint(101, (n,), device=device)
    run_network = torch.compile(network) if options.compile else network

    def step() -> None:
        with torch.autocast(device.type, torch.bfloat16, enabled=bfloat16):
            predicted = run_network(x_t, t, y)
        mse_loss(predicted, noise).backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        ema.update(0)
        if device.type == "cuda":
            torch.cuda.synchronize()

    return step


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--num-channels", type=int, default=64, help="channels at full resolution")
    parser.add_argument("--image-size", type=int, default=64, help="pixels")
    parser.add_argument("--batch-size", type=int, default=16, help="images per step")
    parser.add_argument("--repeats", type=int, default=7, help="timed steps of each")
    parser.add_argument("--compile", action="store_true", help="run the network through torch.compile")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args()
    use_huge_pages()  # as training does

    steps = {name: make_step(options, memory_format) for name, memory_format in FORMATS.items()}
    for step in steps.values():
        step()  # allocates, chooses algorithms, and may compile
        step()
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(options.repeats):
        for name, step in steps.items():
            start = time.perf_counter()
            step()
            seconds[name].append(time.perf_counter() - start)

    threads = f", {torch.get_num_threads()} threads" if options.device == "cpu" else ""
    print(
        f"UNet of {options.num_channels} channels at {options.image_size}x{options.image_size}, "
        f"batch {options.batch_size}, on {options.device}{threads}"
    )
    rates = {name: options.batch_size / statistics.median(times) for name, times in seconds.items()}
    slow, fast = rates.values()
    for name, rate in rates.items():
        print(f"{name:<24}{rate:>10.2f} images/s")
    print(f"{'ratio':<24}{fast / slow:>10.2f}")


if __name__ == "__main__":
    main()
