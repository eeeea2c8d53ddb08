"""Does guidance help, which kind, and how strong? FID of a model's images by kind and scale of guidance, the scale
chosen on one seed of noise and reported on another.

python scripts/guidance_table.py runs/demo data/synthetic-64/test --guide runs/demo:step_0000500.pt --out runs/guidance

Features are kept as fid.py keeps them, so an interrupted command goes on where it stopped.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import sys
from pathlib import Path

from improved_diffusion.errors import ArgumentParser, UserError, user_errors_exit
from improved_diffusion.files import write_text
from improved_diffusion.results import markdown_table


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("run", metavar="RUN", help="run directory, checkpoint, .safetensors file, or pretrained")
    add("real", metavar="REAL", help="reference images")
    add("--guide", metavar="RUN[:CHECKPOINT]", help="a worse model of the same images, for autoguidance")
    add("--scales", type=float, nargs="+", default=[1.25, 1.5, 2.0, 3.0], help="default: %(default)s")
    interval_help = "noise levels, sigma / signal, of guidance in an interval (default: %(default)s)"
    add("--interval", type=float, nargs=2, metavar=("LO", "HI"), default=[0.3, 5.0], help=interval_help)
    add("--features", type=int, default=64, choices=(64, 192, 768, 2048), help="default: %(default)s")
    add("--per-class", type=int, help="images of each class (default: as many as REAL has)")
    add("--seeds", type=int, nargs=2, metavar=("CHOOSE", "REPORT"), default=[1, 2], help="default: %(default)s")
    add("--out", type=Path, required=True, help="folder for guidance.md and guidance.json")
    options = parser.parse_args(arguments)
    if min(options.scales) <= 1:
        parser.error(f"--scales are of guidance, above 1: {min(options.scales)} is none")
    low, high = options.interval
    if not 0 <= low < high:
        parser.error(f"--interval must be two increasing levels, none below 0, not {low:g} and {high:g}")
    if options.seeds[0] == options.seeds[1]:
        parser.error("--seeds must differ: a scale is not reported on the noise by which it was chosen")
    return options


def main(arguments: list[str]) -> None:
    options = parse(arguments)

    from improved_diffusion import load
    from improved_diffusion.runtime.devices import Processes
    from improved_diffusion.sampling.flags import split_guide
    from improved_diffusion.sampling.measuring import Drawn, open_sets

    model = load(options.run)
    everywhere = dataclasses.replace(model.config.sampling, guidance_interval=None)
    model = dataclasses.replace(model, config=dataclasses.replace(model.config, sampling=everywhere))
    guided = {"classifier-free": model} if model.config.model.class_dropout > 0 else {}
    if options.guide:
        guided["autoguidance"] = model.guided_by(load(*split_guide(options.guide)))
    if not guided:
        raise UserError(f"{options.run} was trained with model.class_dropout 0: it can only be guided by --guide RUN")
    choose, tell = options.seeds

    def row(kind: str, interval: list[float] | None, scales: list[float]) -> dict:
        """FID at every scale on the first seed, and at the best of them on the second."""

        def measure(scale: float, seed: int):
            changes = {"guidance_scale": scale, "guidance_interval": interval}
            drawn = Drawn(options.per_class, seed=seed, changes=changes)
            sides = options.real, guided.get(kind, model)
            opened = open_sets(*sides, ["fid"], options.features, processes=Processes(model.device), drawn=drawn)
            return opened.measure("fid")[0]

        name = kind if interval is None else "{}, {:g} to {:g}".format(kind, *interval)
        values = {}
        for scale in scales:
            values[scale] = measure(scale, choose).value
            print(f"{name:>32} at {scale:g}: {values[scale]:.4f}", flush=True)
        chosen = min(values, key=values.__getitem__)
        return {"kind": name, "values": values, "chosen": chosen, "reported": measure(chosen, tell).as_dict()}

    rows = [row("none", None, [1.0])]
    rows += [row(*which, options.scales) for which in itertools.product(guided, (None, options.interval))]
    write_text(options.out / "guidance.json", json.dumps(rows, indent=2) + "\n")
    table = markdown(rows, options.scales, choose, tell)
    write_text(options.out / "guidance.md", table + "\n")
    print(f"\n{table}")


def markdown(rows: list[dict], scales: list[float], choose: int, tell: int) -> str:
    """A line for each kind of guidance, a column for each scale."""
    measured = rows[0]["reported"]
    title = f"{measured['metric']}, n = {measured['n_fake']:,} against {measured['n_real']:,}; scales on seed {choose}"
    columns = ["guidance", *(f"{scale:g}" for scale in [1.0, *scales]), f"the best of them on seed {tell}"]
    lines = []
    for row in rows:
        cells = [f"{row['values'][scale]:.3f}" if scale in row["values"] else "" for scale in [1.0, *scales]]
        told = row["reported"]
        best = f"{row['chosen']:g}: {told['value']:.3f} ({told['low']:.3f} to {told['high']:.3f})"
        lines.append([row["kind"], *cells, best])
    return "\n".join([title, "", *markdown_table(columns, lines)])


if __name__ == "__main__":
    with user_errors_exit():
        main(sys.argv[1:])
