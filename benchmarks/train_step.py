"""How fast a training step of the UNet is: `python benchmarks/train_step.py [--num-channels 64] [--demo] [--compile]`.

A step is forward, backward, gradient clipping, AdamW and one moving average, on random images. Float32 in NCHW is
compared with what training uses: channels_last, in bfloat16 where the machine computes that. The two take turns, so
that other work on the machine slows both, and the medians are printed. On a CPU then the machine's own rates, of the
best convolution and of copying, and the parts of a step: their share of the time, and how near the peak they compute.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch.nn.functional import conv2d, mse_loss
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

from improved_diffusion.models.ema import EMA
from improved_diffusion.models.unet import UNet
from improved_diffusion.runtime.devices import arithmetic, choose_precision, default_device, use_huge_pages

Step = Callable[[], Any]

DEMO = {"num_channels": 16, "channel_multipliers": (1, 2, 4, 4), "num_res_blocks": 1, "attention_resolutions": (8,)}

# Parts of a step by what their operations' names contain; the first that fits counts.
PARTS = {
    "convolution": ("convolution",),
    "group norm, SiLU": ("group_norm", "GroupNorm", "FusedOnCPU", "silu"),
    "matrix products, attention": ("::mm", "::addmm", "::bmm", "attention", "softmax"),
    "optimizer, clipping": ("adam", "vector_norm", "::mul_", "::stack"),
    "moving average": ("lerp",),
    "copies, casts, concatenation": ("copy_", "::cat", "::fill_", "::zero_"),
    "all else": ("",),
}
COMPUTING = {"convolution": ("convolution",), "matrix products, attention": ("mm", "attention")}  # of the FLOPs


def make_step(options: argparse.Namespace, memory_format: torch.memory_format, dtype: torch.dtype) -> Step:
    """A function that takes one training step and returns when it is done."""
    device = torch.device(options.device)
    torch.manual_seed(0)
    n, size = options.batch_size, options.image_size
    network = UNet(
        image_size=size, num_classes=101, **(DEMO if options.demo else {"num_channels": options.num_channels})
    )
    network.to(device, memory_format=memory_format)
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-4, fused=True)
    ema = EMA(dict(network.named_parameters()), rates=(0.9999,))
    x_t = torch.randn(n, 3, size, size, device=device).to(memory_format=memory_format)
    noise = torch.randn(n, 3, size, size, device=device)
    t = torch.randint(1000, (n,), device=device)
    y = torch.randint(101, (n,), device=device)
    compiled = options.compile and memory_format is torch.channels_last
    run_network = torch.compile(network) if compiled else network

    def step() -> None:
        with torch.autocast(device.type, dtype, enabled=dtype is torch.bfloat16):
            predicted = run_network(x_t, t, y)
        mse_loss(predicted, noise).backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        ema.update(0)
        if device.type == "cuda":
            torch.cuda.synchronize()

    return step


def seconds_of(function: Step) -> float:
    """Of one thread on a CPU those of the processor, which other work on the machine disturbs less."""
    clock = time.process_time if torch.get_num_threads() == 1 and not torch.cuda.is_available() else time.perf_counter
    start = clock()
    function()
    return clock() - start


def convolution_peak(dtype: torch.dtype, batch_size: int) -> float:
    """GFLOP/s of the fastest forward 3x3 convolution in channels_last among some that a UNet has."""
    rates = []
    for channels, size in ((64, 64), (128, 32), (192, 16), (256, 16)):
        x = torch.randn(batch_size, channels, size, size).to(dtype, memory_format=torch.channels_last)
        weight = torch.randn(channels, channels, 3, 3).to(dtype, memory_format=torch.channels_last)
        with torch.no_grad():
            best = min(seconds_of(lambda x=x, w=weight: conv2d(x, w, padding=1)) for _ in range(8))
        rates.append(2 * 9 * channels**2 * size**2 * batch_size / best / 1e9)
    return max(rates)


def copy_rate() -> float:
    """GB/s, read and written, of copying a tensor much larger than the caches."""
    source = torch.ones(1 << 26)
    target = torch.empty_like(source)
    return 2 * source.nbytes / min(seconds_of(lambda: target.copy_(source)) for _ in range(6)) / 1e9


def flops_of(step: Step) -> dict[str, float]:
    """GFLOP of a step by PyTorch's counter: of the parts that it counts."""
    with FlopCounterMode(display=False) as counter:
        step()
    counts = {str(operation): flops for operation, flops in counter.get_flop_counts()["Global"].items()}
    return {
        part: sum(flops for operation, flops in counts.items() if any(name in operation for name in names)) / 1e9
        for part, names in COMPUTING.items()
    }


def shares_of(step: Step, repeats: int) -> dict[str, float]:
    """The parts of the time of a step."""
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        for _ in range(repeats):
            step()
    spent = dict.fromkeys(PARTS, 0.0)
    for event in profiler.key_averages():
        spent[next(part for part, names in PARTS.items() if any(n in event.key for n in names))] += (
            event.self_cpu_time_total
        )
    total = sum(spent.values())
    return {part: time / total for part, time in spent.items()}


def print_parts(step: Step, seconds: float, dtype: torch.dtype, options: argparse.Namespace) -> None:
    """The machine's rates, and a step against them."""
    peak, flops, shares = convolution_peak(dtype, options.batch_size), flops_of(step), shares_of(step, options.repeats)
    rate = sum(flops.values()) / seconds
    print(f"this machine: best 3x3 convolution {peak:.0f} GFLOP/s, copies {copy_rate():.1f} GB/s")
    print(f"a step: {sum(flops.values()):.1f} GFLOP at {rate:.0f} GFLOP/s, {rate / peak:.0%} of the peak")
    print(f"{'part of a step':<32}{'time':>6}{'GFLOP':>8}{'of peak':>9}")
    for part, share in shares.items():
        computed = f"{flops[part]:8.1f}{flops[part] / (share * seconds) / peak:9.0%}" if flops.get(part) else ""
        print(f"{part:<32}{share:>6.1%}{computed}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--num-channels", type=int, default=64, help="channels at full resolution")
    parser.add_argument("--demo", action="store_true", help="the network of configs/demo.yaml")
    parser.add_argument("--image-size", type=int, default=64, help="pixels")
    parser.add_argument("--batch-size", type=int, default=16, help="images per step")
    parser.add_argument("--repeats", type=int, default=7, help="timed steps of each")
    parser.add_argument("--compile", action="store_true", help="run the second network through torch.compile")
    parser.add_argument("--device", default=default_device())
    options = parser.parse_args()
    use_huge_pages()  # as training does

    device = torch.device(options.device)
    precision, dtype = choose_precision("auto", device)[0], arithmetic("auto", device)
    steps = {
        "float32 NCHW": make_step(options, torch.contiguous_format, torch.float32),
        f"{precision} channels_last": make_step(options, torch.channels_last, dtype),
    }
    for name, step in steps.items():
        first, second = seconds_of(step), seconds_of(step)  # allocates, chooses algorithms, and may compile
        if options.compile:
            print(f"{name}: first step {first:.1f} s, second {second:.1f} s")
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(options.repeats):
        for name, step in steps.items():
            seconds[name].append(seconds_of(step))

    threads = f", {torch.get_num_threads()} thread(s)" if device.type == "cpu" else ""
    network = "the demo's UNet" if options.demo else f"UNet of {options.num_channels} channels"
    print(f"{network} at {options.image_size}x{options.image_size}, batch {options.batch_size}, on {device}{threads}")
    slow, fast = medians = [statistics.median(times) for times in seconds.values()]
    for name, median in zip(steps, medians, strict=True):
        print(f"{name:<24}{options.batch_size / median:>10.2f} images/s")
    print(f"{'ratio':<24}{slow / fast:>10.2f}", flush=True)
    if device.type == "cpu" and not options.compile:
        print_parts(steps[f"{precision} channels_last"], fast, dtype, options)


if __name__ == "__main__":
    main()
