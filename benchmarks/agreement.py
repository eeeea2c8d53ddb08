"""Whether the fast ways give what the plain one gives: `python benchmarks/agreement.py data/synthetic-64`.

A small UNet is trained three times for a few hundred steps: as training does it, in the plain way (float32, NCHW,
PyTorch's own group norm), and in the plain way from another seed, which says how far apart loss curves are by chance.
Then both ways draw the same images of the small model in pretrained/synthetic-64; their FID64 from the set's test split
is printed with its interval, and how far apart the images are.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
from pathlib import Path

import numpy as np
import torch

from improved_diffusion import fid, load
from improved_diffusion.config import Config, DiffusionConfig, TrainingConfig, UNetConfig
from improved_diffusion.data.image_set import ImageSet, open_image_set
from improved_diffusion.errors import user_errors_exit
from improved_diffusion.runtime.devices import Processes, use_huge_pages
from improved_diffusion.sampling.model import Model
from improved_diffusion.training.trainer import Trainer

SMALL = Path(__file__).parents[1] / "pretrained" / "synthetic-64"
INTERVALS = 10  # of a loss curve


def loss_curve(image_set: ImageSet, steps: int, *, plain: bool, seed: int) -> np.ndarray:
    """The mean losses of so many intervals of a run, (INTERVALS,)."""
    small = UNetConfig(num_channels=8, channel_multipliers=(1, 2, 2), num_res_blocks=1, attention_resolutions=(16,))
    training = TrainingConfig(batch_size=8, lr=1e-3, steps=steps, precision="float32" if plain else "auto")
    config = Config(model=small, diffusion=DiffusionConfig(timesteps=1000), training=training, loss="mse", seed=seed)
    processes = Processes(torch.device("cpu"))
    trainer = Trainer(config, image_set, processes)
    if plain:
        trainer.network.to(memory_format=torch.contiguous_format)
    means = []
    for step in range(steps):
        x, y = trainer.stream.batch(step)
        trainer.train_step(x.contiguous() if plain else x, y)
        if (step + 1) % (steps // INTERVALS) == 0:
            means.append(trainer.terms.flush(processes)["loss"])
    return np.array(means)


def plainly(model: Model) -> Model:
    """The model, to be drawn from in the plain way."""
    network = copy.deepcopy(model.network).to(memory_format=torch.contiguous_format)
    return dataclasses.replace(model, network=network, precision="float32")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data", type=Path, help="the embedded set, with its test split")
    parser.add_argument("--steps", type=int, default=300, help="of training; 0: none")
    parser.add_argument("--per-class", type=int, default=20, help="images of each class that are drawn; 0: none")
    parser.add_argument("--sampling-steps", type=int, default=10)
    options = parser.parse_args()
    use_huge_pages()  # as training does

    if options.steps:
        image_set = open_image_set(options.data)
        plain = loss_curve(image_set, options.steps, plain=True, seed=0)
        fast = loss_curve(image_set, options.steps, plain=False, seed=0)
        other = loss_curve(image_set, options.steps, plain=True, seed=1)
        print(f"mean losses of {options.steps // INTERVALS} steps each\n  steps     plain      fast  another seed")
        for index, row in enumerate(zip(plain, fast, other, strict=True)):
            print(f"{(index + 1) * options.steps // INTERVALS:7,}  {row[0]:8.5f}  {row[1]:8.5f}  {row[2]:12.5f}")
        apart, by_chance = (np.abs(curve - plain).max() for curve in (fast, other))
        print(f"largest difference from plain: fast {apart:.1e}, another seed {by_chance:.1e}", flush=True)
    if options.per_class:
        model = load(SMALL, device="cpu")
        drawn = {}
        for name, way in {"plain": plainly(model), "fast": model}.items():
            drawn[name] = way.sample(n=options.per_class, steps=options.sampling_steps, show_progress=False)
            measured = fid(options.data / "test", drawn[name], features=64, device="cpu")
            interval = f"[{measured.low:.4f}, {measured.high:.4f}]"
            print(f"FID64 of {measured.n_fake} images, {name}: {measured.value:.4f} {interval}")
        levels = np.abs(drawn["plain"].astype(int) - drawn["fast"])
        print(f"pixels that differ: {np.mean(levels > 0):.2%}, by at most {levels.max()} of 255")


if __name__ == "__main__":
    with user_errors_exit():
        main()
