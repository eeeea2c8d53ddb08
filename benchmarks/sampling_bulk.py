"""Sampling in bulk: `python benchmarks/sampling_bulk.py [--counts 200 2000] [--image-size 64]`.

First what writing images costs: as it is done, against each image synced to disk and all read again for a grid of all
and an .npz. The two take turns, so that other work on the machine slows both. Then sample.py --npz with a tiny model of
random weights, one process for each number of images: the most memory that it held, and its rate, its start included.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
import yaml
from PIL import Image

from improved_diffusion.config_file import load_config
from improved_diffusion.data.packing import allocate
from improved_diffusion.errors import user_errors_exit
from improved_diffusion.models.build import build_network
from improved_diffusion.run_directory import RunDirectory
from improved_diffusion.sampling.grids import make_grid, save_png
from improved_diffusion.sampling.growing_array import open_rows, write_npz

PROJECT = Path(__file__).parent.parent
CLASSES = 10


def write_and_read_again(images: Sequence[np.ndarray], out: Path) -> None:
    """Each synced; the grid of all and the .npz made of what is read from the files."""
    files = [out / f"{number:06d}.png" for number in range(len(images))]
    for image, file in zip(images, files, strict=True):
        save_png(image, file)
    array = np.stack([np.asarray(Image.open(file)) for file in files])
    save_png(make_grid(array.reshape(CLASSES, -1, *array.shape[1:])), out.with_suffix(".png"))
    np.savez(out / "samples.npz", arr_0=array, labels=np.arange(len(array)))


def write_once(images: Sequence[np.ndarray], out: Path) -> None:
    """As sample.py does."""
    out.mkdir()
    rows = out / ".arr_0.npy.tmp"
    allocate(rows, (len(images), *images[0].shape))
    with open_rows(rows) as write_row:
        for number, image in enumerate(images):
            save_png(image, out / f"{number:06d}.png", durable=False)
            write_row(number, image)
    write_npz(out / "samples.npz", rows, np.arange(len(images)))


def compare_writing(folder: Path, count: int, size: int, repeats: int) -> None:
    """Print the rates of both ways, and their ratio."""
    # Smooth, with a little noise: about as large as PNGs of photos of this size.
    x = np.add.outer(np.arange(size), np.arange(size))[..., None].repeat(3, 2)
    noise = np.random.default_rng(0).integers(0, 20, (16, size, size, 3))
    images = [(x + noise[number % 16]).astype(np.uint8) for number in range(count)]
    ways: dict[str, Callable] = {"synced, read again": write_and_read_again, "as sample.py does": write_once}
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for repeat in range(repeats):
        for name, way in ways.items():
            start = time.perf_counter()
            way(images, folder / f"{name.split()[0]}{repeat}")
            seconds[name].append(time.perf_counter() - start)
    rates = {name: count / min(times) for name, times in seconds.items()}
    print(f"writing {count:,} images of {size}x{size} as PNG and .npz")
    for name, rate in rates.items():
        print(f"{name:<24}{rate:>10,.0f} images/s")
    slow, fast = rates.values()
    print(f"{'ratio':<24}{fast / slow:>10.2f}")


def make_run(folder: Path, size: int) -> Path:
    """A run directory of a tiny model that was not trained."""
    folder.mkdir()
    run = RunDirectory(folder)
    model = {"image_size": size, "num_channels": 8, "channel_multipliers": [1, 1, 1], "num_res_blocks": 1}
    run.config_file.write_text(yaml.safe_dump({"model": {**model, "attention_resolutions": []}, "data": "none"}))
    network = build_network(load_config(run.config_file), CLASSES)
    names = [f"class{label}" for label in range(CLASSES)]
    run.save_checkpoint({"step": 1, "model": network.state_dict(), "ema": {}, "class_names": names}, keep=1)
    return folder


def sample(run: Path, count: int, out: Path) -> tuple[float, float]:
    """Seconds and peak MiB of one sample.py of `count` images."""
    flags = ["--sampler", "ddim", "--sampling-steps", "1", "--batch-size", "20", "--npz"]
    command = [sys.executable, "sample.py", "--run", str(run), "--n", str(count // CLASSES), *flags, "--out", str(out)]
    environment = {**os.environ, "PYTHONPATH": str(PROJECT)}
    start = time.perf_counter()
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen(command, cwd=PROJECT, env=environment, stdout=log, stderr=log)
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode:
            log.seek(0)
            sys.exit(log.read().decode())
    return time.perf_counter() - start, usage.ru_maxrss / 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--counts", type=int, nargs="+", default=[200, 2000], help="images of each run of sample.py")
    parser.add_argument("--image-size", type=int, default=64, help="pixels")
    parser.add_argument("--written", type=int, default=1000, help="images of the comparison of writing")
    parser.add_argument("--repeats", type=int, default=3, help="turns of that comparison; the best counts")
    parser.add_argument("--folder", type=Path, help="on whose disk to write (default: that of temporary files)")
    options = parser.parse_args()
    torch.set_grad_enabled(False)
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        compare_writing(Path(name), options.written, options.image_size, options.repeats)
        run = make_run(Path(name) / "run", options.image_size)
        print("\nsample.py, start included\n  images   seconds  images/s  peak MiB")
        for count in options.counts:
            seconds, peak = sample(run, count, Path(name) / str(count))
            print(f"{count:8,}  {seconds:8.1f}  {count / seconds:8,.1f}  {peak:8,.0f}")


if __name__ == "__main__":
    with user_errors_exit():
        main()
