"""FID of a run's images against the number of network evaluations, for every sampler: a table and a plot.

python scripts/sampler_curve.py runs/hybrid data/food101-64/val --evaluations 5 10 15 25 50 100 250 --out runs/curve

All points share their latents. The report is written anew with every point, from few evaluations to many. Features are
kept as fid.py keeps them, so an interrupted command goes on where it stopped, and one that is given again draws nothing
anew.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import sys
from pathlib import Path
from typing import Any

from improved_diffusion.config import SAMPLER_OPTIONS, SamplingConfig
from improved_diffusion.errors import ArgumentParser, UserError, user_errors_exit
from improved_diffusion.files import atomic_write, write_text
from improved_diffusion.results import markdown_table
from improved_diffusion.sampling.flags import sampler_option


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path, metavar="RUN", help="run directory")
    parser.add_argument("real", type=Path, metavar="REAL", help="reference images")
    parser.add_argument("--evaluations", type=int, nargs="+", default=[5, 10, 15, 25, 50, 100, 250])
    parser.add_argument(
        "--samplers",
        nargs="+",
        default=list(SAMPLER_OPTIONS),
        metavar="SAMPLER[:NAME=VALUE,...]",
        help=f"each with options of its own, such as dpmpp_2m:eta=1 (default: {' '.join(SAMPLER_OPTIONS)})",
    )
    parser.add_argument("--features", type=int, default=64, choices=(64, 192, 768, 2048), help="default: %(default)s")
    parser.add_argument("--per-class", type=int, help="images of each class (default: as many as REAL has)")
    parser.add_argument("--checkpoint", help="best, latest or step_0015000.pt (default: best, or else latest)")
    parser.add_argument("--guidance-scale", type=float, help="default: the run's own")
    parser.add_argument("--seed", type=int, default=1, help="of the images (default: %(default)s)")
    parser.add_argument("--out", type=Path, required=True, help="folder for curve.md, curve.json and curve.png")
    return parser.parse_args(arguments)


def sampler_settings(text: str) -> dict[str, Any]:
    """SAMPLER[:NAME=VALUE,...] as settings.

    Raises:
        UserError: no such sampler, or an option that it lacks or that is out of range.
    """
    sampler, _, options = text.partition(":")
    if sampler not in SAMPLER_OPTIONS:
        raise UserError(f"--samplers: there is no sampler {sampler!r}, only {', '.join(SAMPLER_OPTIONS)}")
    settings = {"sampler": sampler, "options": dict(map(sampler_option, options.split(","))) if options else {}}
    SamplingConfig(**settings)
    return settings


def steps_for(sampler: str, evaluations: int) -> int:
    """The steps that take at most so many network evaluations: Heun's method takes two in each but the last."""
    return max(1, (evaluations + 1) // 2) if sampler == "heun" else evaluations


def main(arguments: list[str]) -> None:
    options = parse(arguments)
    if min(options.evaluations) < 1:
        raise UserError(f"--evaluations must be at least 1, not {min(options.evaluations)}")
    samplers = {text: sampler_settings(text) for text in options.samplers}

    from improved_diffusion.metrics import FeatureExtractor, extract_features, metric_name, open_source
    from improved_diffusion.metrics.estimate import bootstrap_interval
    from improved_diffusion.metrics.fid import frechet_inception_distance
    from improved_diffusion.runtime.devices import default_device
    from improved_diffusion.sampling.loading import load
    from improved_diffusion.sampling.model import change_sampling
    from improved_diffusion.sampling.run_source import run_source

    device = default_device()
    extractor = FeatureExtractor((options.features,), device)
    model, reference = load(options.run, options.checkpoint, device=device), open_source(options.real)
    real = extract_features(reference, extractor)[options.features]
    points: list[dict] = []
    for evaluations, (label, own) in itertools.product(options.evaluations, samplers.items()):
        sampler = own["sampler"]
        sampling = change_sampling(
            dataclasses.replace(model.config.sampling, spacing=None),
            **own,
            steps=steps_for(sampler, evaluations),
            guidance_scale=options.guidance_scale,
        )
        timesteps = model.config.diffusion.timesteps
        if sampling.chosen_spacing == "uniform" and timesteps is not None and evaluations > timesteps:
            continue
        if any((point["sampler"], point["steps"]) == (label, sampling.steps) for point in points):
            continue  # what is left over is too little for another step of heun
        source = run_source(model, reference, sampling, options.seed, options.per_class)
        estimate = frechet_inception_distance(real, extract_features(source, extractor)[options.features])
        low, high = bootstrap_interval(estimate)
        taken = 2 * sampling.steps - 1 if sampler == "heun" else evaluations
        points.append(
            {
                "sampler": label,
                "budget": evaluations,
                "evaluations": taken,
                "steps": sampling.steps,
                "value": estimate.value,
                "low": low,
                "high": high,
            }
        )
        print(f"{label:>14} {taken:>4} {estimate.value:.4f} ({low:.4f} to {high:.4f})", flush=True)
        title = f"{metric_name(options.features)}, n = {len(source)} against {real.n:,}, seed {options.seed}"
        report(points, options.out, title)
    if not points:
        raise UserError(f"none of the samplers can take {' or '.join(map(str, options.evaluations))} evaluations")
    print(f"\n{(options.out / 'curve.md').read_text()}", end="")


def report(points: list[dict], out: Path, title: str) -> None:
    """Write curve.json, curve.md and curve.png."""
    write_text(out / "curve.json", json.dumps({"title": title, "points": points}, indent=2) + "\n")
    samplers = list(dict.fromkeys(point["sampler"] for point in points))
    columns = sorted({point["budget"] for point in points})
    values = {(point["sampler"], point["budget"]): point["value"] for point in points}
    rows = [[s, *(f"{values[s, n]:.3f}" if (s, n) in values else "" for n in columns)] for s in samplers]
    table = markdown_table(["sampler", *map(str, columns)], rows)
    lines = [f"{title}, by network evaluations at the most", "", *table]
    write_text(out / "curve.md", "\n".join(lines) + "\n")

    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    for sampler in samplers:
        of_one = [point for point in points if point["sampler"] == sampler]
        x = [point["evaluations"] for point in of_one]
        axes.plot(x, [point["value"] for point in of_one], "o-", label=sampler)
        axes.fill_between(x, [point["low"] for point in of_one], [point["high"] for point in of_one], alpha=0.15)
    metric = title.split(",")[0]
    axes.set(title=title, xlabel="network evaluations per image", ylabel=metric, xscale="log", yscale="log")
    axes.set_xticks(columns, map(str, columns))
    axes.minorticks_off()
    axes.grid(alpha=0.3)
    axes.legend()
    with atomic_write(out / "curve.png") as temporary:
        figure.savefig(temporary, format="png", dpi=120)


if __name__ == "__main__":
    with user_errors_exit():
        main(sys.argv[1:])
