"""How often the evaluator's intervals hold the truth, on Gaussians whose Fréchet distance is known.

    python scripts/interval_coverage.py [--trials 200] [--d 64] [--n 640 2560] [--seed 0]

Two Gaussians with diagonal covariances of a power-law spectrum, like those of image features, at several true
distances. In each trial both are sampled anew. An interval speaks of the value at this n, for which the mean over the
trials stands; one of FID-infinity speaks of the true distance. `actual` is the standard deviation over the
trials, `claimed` the mean standard error by the intervals' widths.
"""

from __future__ import annotations

import argparse
import math
from statistics import NormalDist
from typing import TYPE_CHECKING

import numpy as np

from improved_diffusion.errors import ArgumentParser, UserError, user_errors_exit
from improved_diffusion.progress import progress

if TYPE_CHECKING:
    from improved_diffusion.metrics import Features

SHIFTS = (0.0, 0.1, 0.5)  # of the mean, and of the logarithm of the deviations, between the two Gaussians


def parse_arguments() -> argparse.Namespace:
    parser = ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--trials", type=int, default=200, help="for each line of the table")
    parser.add_argument("--d", type=int, default=64, help="features")
    parser.add_argument("--n", type=int, nargs="+", default=[640, 2560], help="images of each set")
    parser.add_argument("--confidence", type=float, default=0.95)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    if not 0 < options.confidence < 1:
        raise UserError(f"--confidence is {options.confidence}: it must lie between 0 and 1")
    return options


def sample(n: int, deviations: np.ndarray, mean: np.ndarray, rng: np.random.Generator) -> Features:
    from improved_diffusion.metrics.features import Features
    from improved_diffusion.metrics.inception.extractor import FeatureSettings

    array = (rng.normal(size=(n, len(deviations))) * deviations + mean).astype(np.float32)
    return Features("Gaussian", array, FeatureSettings(len(deviations), "none", "float32", ""))


def main() -> None:
    options = parse_arguments()

    # Only now, for torch takes seconds to import: --help and typos are answered at once.
    import torch

    from improved_diffusion.metrics.estimate import bootstrap_interval
    from improved_diffusion.metrics.fid import IMAGES_PER_FEATURE, fid_infinity, frechet_inception_distance
    from improved_diffusion.metrics.neighbours import density_coverage, precision_recall

    torch.set_num_threads(1)
    deviations = np.arange(1, options.d + 1) ** -0.5
    print(f"{options.trials} trials, d = {options.d}, {options.confidence:.0%} intervals, seed {options.seed}")
    print(f"{'':14} {'true':>8} {'n':>6} {'mean':>9} {'actual':>9} {'claimed':>9} {'coverage':>9}")
    for shift in SHIFTS:
        stretched, mean = deviations * math.exp(shift), np.full(options.d, shift) * deviations
        truth = float((mean**2).sum() + ((stretched - deviations) ** 2).sum())
        for n in options.n:
            rng = np.random.default_rng([options.seed, n])
            results: dict[str, list[tuple[float, float, float]]] = {}
            for _ in progress(iterable=range(options.trials), desc=f"distance {truth:.3f}, n {n}", leave=False):
                sets = sample(n, deviations, 0 * mean, rng), sample(n, stretched, mean, rng)
                estimates = {"FID": frechet_inception_distance(*sets)}
                if n >= IMAGES_PER_FEATURE * options.d:
                    estimates["FID-infinity"] = fid_infinity(*sets)
                estimates |= precision_recall(*sets) | density_coverage(*sets)
                for name, estimate in estimates.items():
                    interval = bootstrap_interval(estimate, options.confidence, replicates=500)
                    results.setdefault(name, []).append((estimate.value, *interval))
            for name, values in results.items():
                print_row(name, np.array(values), truth, n, options.confidence)


def print_row(name: str, values: np.ndarray, truth: float, n: int, confidence: float) -> None:
    value, low, high = values.T
    target = truth if name == "FID-infinity" else value.mean()
    covered = ((low <= target) & (target <= high)).mean()
    z = NormalDist().inv_cdf((1 + confidence) / 2)
    claimed = (high - low).mean() / (2 * z)
    print(f"{name:14} {truth:8.4f} {n:6} {value.mean():9.4f} {value.std():9.4f} {claimed:9.4f} {covered:9.1%}")


if __name__ == "__main__":
    with user_errors_exit():
        main()
