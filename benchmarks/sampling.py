"""How fast images are drawn: `python benchmarks/sampling.py [--run RUN] [--images 128] [--sampling-steps 25]`.

The plain way, float32 in NCHW by PyTorch's own group norm, is compared with what sample.py does, both by DDIM. They
take turns, so that other work on the machine slows both, and the least time of each is printed, by the clock and of the
processor. A third line is the baseline of 250 ancestral steps in the plain way, of fewer images. On a CPU the parts of
the time follow.
"""

from __future__ import annotations

import argparse
import copy
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from train_step import shares_of

from improved_diffusion import load
from improved_diffusion.config import SamplingConfig
from improved_diffusion.errors import user_errors_exit
from improved_diffusion.models.build import build_denoiser
from improved_diffusion.runtime.devices import use_huge_pages
from improved_diffusion.sampling.generate import generate
from improved_diffusion.sampling.model import Model, change_sampling

SMALL = Path(__file__).parents[1] / "pretrained" / "synthetic-64"


class Times(NamedTuple):
    """Seconds per image."""

    clock: float
    processor: float


def plain_way(model: Model) -> Callable[[int, SamplingConfig], None]:
    """Draw some images unguided, the whole batch at once."""
    network = copy.deepcopy(model.network).to(memory_format=torch.contiguous_format)
    denoiser = build_denoiser(model.config, network)

    def draw(count: int, sampling: SamplingConfig) -> None:
        for _ in generate(denoiser, keys_of(model, count), model.config, sampling, model.device):
            pass

    return draw


def fast_way(model: Model) -> Callable[[int, SamplingConfig], None]:
    """As sample.py draws."""

    def draw(count: int, sampling: SamplingConfig) -> None:
        for _ in model.draw(keys_of(model, count), sampling):
            pass

    return draw


def keys_of(model: Model, count: int) -> list:
    return model.keys(None, -(-count // len(model.row_names)), seed=0)[:count]


def timed(draw: Callable[[int, SamplingConfig], None], count: int, sampling: SamplingConfig) -> Times:
    clock, processor = time.perf_counter(), time.process_time()
    draw(count, sampling)
    return Times((time.perf_counter() - clock) / count, (time.process_time() - processor) / count)


def least(times: list[Times]) -> Times:
    return Times(*map(min, zip(*times, strict=True)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--run", default=SMALL, help="as of sample.py")
    parser.add_argument("--images", type=int, default=128)
    parser.add_argument("--sampling-steps", type=int, default=25, help="evaluations by DDIM")
    parser.add_argument("--baseline-images", type=int, default=32, help="by 250 ancestral steps; 0: none")
    parser.add_argument("--repeats", type=int, default=3, help="turns of each")
    options = parser.parse_args()
    use_huge_pages()  # as sample.py does
    model = load(options.run)
    ddim = {"sampler": "ddim", "steps": options.sampling_steps}
    few = change_sampling(model.config.sampling, **ddim, guidance_scale=1.0, batch_size=options.images)
    many = change_sampling(few, sampler="ancestral", steps=250)
    ways = {"float32 NCHW": plain_way(model), "as sample.py draws": fast_way(model)}
    for draw in ways.values():
        draw(options.images, change_sampling(few, steps=1))  # allocates, chooses algorithms, may compile
    times: dict[str, list[Times]] = {name: [] for name in ways}
    for _ in range(options.repeats):
        for name, draw in ways.items():
            times[name].append(timed(draw, options.images, few))
    of_ways = {name: least(turns) for name, turns in times.items()}
    plain, fast = of_ways.values()

    threads = f", {torch.get_num_threads()} thread(s)" if model.device.type == "cpu" else ""
    print(f"{model.checkpoint}: {options.images} images on {model.device}{threads}, drawn in {model.precision}")
    print(f"{'':<36}seconds  of the processor")
    for name, way in of_ways.items():
        print_line(f"{name}, {few.steps} of ddim", way, options.images)
    print(f"{'ratio':<36}{plain.clock / fast.clock:7.2f}  {plain.processor / fast.processor:16.2f}", flush=True)
    if options.baseline_images:
        baseline = timed(ways["float32 NCHW"], options.baseline_images, many)
        print_line("float32 NCHW, 250 ancestral", baseline, options.images)
        print(f"{'ratio':<36}{baseline.clock / fast.clock:7.2f}  {baseline.processor / fast.processor:16.2f}")
    if model.device.type == "cpu":
        shares = shares_of(lambda: ways["as sample.py draws"](options.images, change_sampling(few, steps=4)), repeats=1)
        for part, share in shares.items():
            print(f"{part:<36}{share:7.1%}")


def print_line(name: str, times: Times, images: int) -> None:
    print(f"{name:<36}{times.clock * images:7.1f}  {times.processor * images:16.1f}")


if __name__ == "__main__":
    with user_errors_exit():
        main()
