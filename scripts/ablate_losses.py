"""Which loss wins, and by how much: train each loss with several seeds, and compare their FIDs step by step.

python scripts/ablate_losses.py --losses mse hybrid --seeds 2 --out runs/ablation [--training.lr 1e-4 ...]

All runs of one seed see the same images, flips, timesteps and noise. What is not an option of this script goes to
train.py. Runs that are finished are kept and interrupted ones go on, so the command can simply be given again.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from statistics import mean, stdev

from improved_diffusion.errors import ArgumentParser, UserError, user_errors_exit
from improved_diffusion.files import atomic_write

PROJECT = Path(__file__).resolve().parent.parent


def main(arguments: list[str]) -> None:
    parser = ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--losses", nargs="+", choices=("mse", "hybrid", "vlb"), default=["mse", "hybrid"])
    parser.add_argument("--seeds", type=int, default=2, help="runs of each loss, with seeds 0, 1, ... (default: 2)")
    parser.add_argument("--out", type=Path, default=Path("runs/ablation"), help="default: runs/ablation")
    options, for_training = parser.parse_known_args(arguments)
    if options.seeds < 1:
        raise UserError(f"--seeds must be at least 1, not {options.seeds}")

    curves = {
        loss: [train(loss, seed, options.out, for_training) for seed in range(options.seeds)] for loss in options.losses
    }
    table = compare(curves)
    print(table)
    with atomic_write(options.out / "ablation.md") as temporary:
        temporary.write_text(table + "\n")
    plot(curves, options.out / "ablation.png")
    print(f"wrote {options.out}/ablation.md and {options.out}/ablation.png")


def train(loss: str, seed: int, out: Path, for_training: list[str]) -> dict[int, float]:
    """Train, or finish training, one run. Returns {step: FID}."""
    run = out / f"{loss}-seed{seed}"
    if (run / "checkpoints" / "latest").is_file():
        command = ["--resume", str(run)]
    else:
        command = ["--out", str(run), "--loss", loss, f"--seed={seed}", *for_training]
    with subprocess.Popen([sys.executable, str(PROJECT / "train.py"), *command]) as training:
        try:
            status = training.wait()
        except KeyboardInterrupt:  # which the training has got too, and saves
            training.wait()
            raise
    if status:
        raise UserError(f"{run} stopped with exit status {status}; give the command again to go on")
    evaluations = [json.loads(line) for line in (run / "evaluations.jsonl").read_text().splitlines()]
    scores = {e["step"]: e["value"] for e in evaluations if "value" in e}
    if not scores:
        raise UserError(f"{run} was never scored: an ablation needs evaluation.features")
    return scores


def compare(curves: dict[str, list[dict[int, float]]]) -> str:
    """A markdown table of FID by step and loss, mean and standard deviation over the seeds, and the verdict."""
    steps = sorted(set.intersection(*(set(run) for runs in curves.values() for run in runs)))
    lines = ["| step | " + " | ".join(curves) + " |", "|" + " --- |" * (len(curves) + 1)]
    for step in steps:
        lines.append(
            f"| {step} | " + " | ".join(spread([run[step] for run in runs]) for runs in curves.values()) + " |"
        )
    best = {loss: [min(run.values()) for run in runs] for loss, runs in curves.items()}
    lines.append("| best | " + " | ".join(map(spread, best.values())) + " |")
    ranking = sorted(best, key=lambda loss: mean(best[loss]))
    if len(ranking) > 1:
        winner, second = ranking[:2]
        ratio = mean(best[second]) / mean(best[winner])
        seeds = len(best[winner])
        apart = max(best[winner]) < min(best[second])
        lines += [
            "",
            f"{winner} wins: its best FID is {ratio:.2f} times lower than that of {second}, mean of {seeds} seed(s); "
            f"the seeds' ranges {'do not overlap' if apart else 'overlap: more seeds would be needed to be sure'}.",
        ]
    return "\n".join(lines)


def spread(values: list[float]) -> str:
    return f"{mean(values):.3f}" + (f" ± {stdev(values):.3f}" if len(values) > 1 else "")


def plot(curves: dict[str, list[dict[int, float]]], file: Path) -> None:
    """FID against steps, a colour for each loss and a line for each seed."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    for index, (loss, runs) in enumerate(curves.items()):
        for seed, run in enumerate(runs):
            axes.plot(list(run), list(run.values()), "o-", color=f"C{index}", label=loss if seed == 0 else None)
    axes.set(xlabel="step", ylabel="FID", yscale="log")
    axes.grid(alpha=0.3, which="both")
    axes.legend()
    with atomic_write(file) as temporary:
        figure.savefig(temporary, format="png", dpi=120)


if __name__ == "__main__":
    with user_errors_exit():
        main(sys.argv[1:])
