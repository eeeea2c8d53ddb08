"""Which loss wins, and by how much: train each loss with several seeds, and compare their FIDs step by step.

python scripts/ablate_losses.py --losses mse hybrid --seeds 3 --out runs/ablation [--training.lr 1e-4 ...]

All runs of one seed see the same images, flips, timesteps and noise: they are compared in pairs. What is not an option
of this script goes to train.py. Runs that are finished are kept and interrupted ones go on, so the command can simply
be given again, with the same settings.
"""

from __future__ import annotations

import dataclasses
import itertools
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import yaml
from scipy import stats

from improved_diffusion.config import Config
from improved_diffusion.errors import ArgumentParser, UserError, user_errors_exit
from improved_diffusion.files import atomic_write
from improved_diffusion.settings import (
    load_settings,
    parse_arguments,
    read_settings,
    settings_parser,
    to_plain,
    to_settings,
)

PROJECT = Path(__file__).resolve().parent.parent


def main(arguments: list[str]) -> None:
    parser = ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--losses", nargs="+", choices=("mse", "hybrid", "vlb"), default=["mse", "hybrid"])
    parser.add_argument("--seeds", type=int, default=3, help="runs of each loss, with seeds 0, 1, ... (default: 3)")
    parser.add_argument("--out", type=Path, default=Path("runs/ablation"), help="default: runs/ablation")
    parser.add_argument("--config", type=Path, help="YAML file of settings (default: as train.py chooses)")
    options, for_training = parser.parse_known_args(arguments)
    if options.seeds < 1:
        raise UserError(f"--seeds must be at least 1, not {options.seeds}")
    if own := {flag.split("=")[0] for flag in for_training} & {"--loss", "--seed", "--resume"}:
        raise UserError(f"{min(own)} is what differs between the runs of an ablation: give --losses, --seeds and --out")

    runs = {}
    for loss in options.losses:
        settings = settled(loss, options.config, for_training)
        require_same_settings(settings, options.out / f"{loss}.yaml")
        for seed in range(options.seeds):
            run = options.out / f"{loss}-seed{seed}"
            train(run, settings, seed, options.config, for_training)
            runs[loss, seed] = last_series(run)
    require_one_protocol(runs)
    curves = {
        loss: [{record["step"]: record["value"] for record in runs[loss, seed]} for seed in range(options.seeds)]
        for loss in options.losses
    }
    table = compare(curves)
    print(table)
    with atomic_write(options.out / "ablation.md") as temporary:
        temporary.write_text(table + "\n")
    plot(curves, options.out / "ablation.png")
    print(f"wrote {options.out}/ablation.md and {options.out}/ablation.png")


# ----------------------------------------------------------------------------------------------------------------------
# The runs


def settled(loss: str, config_file: Path | None, for_training: list[str]) -> Config:
    """The settings that train.py would give a new run of `loss`, with the paths in them absolute."""
    from improved_diffusion.training import start
    from improved_diffusion.training.evaluation import SPLITS_BESIDE

    defaults = start.choose_defaults(loss, PROJECT)
    file = config_file or defaults.config
    parser = settings_parser(Config)
    parsed = parse_arguments(parser, [f"--loss={loss}", *for_training], read_settings(file), str(file))
    settings = to_settings(Config, parser, parsed)

    def absolute(path: str | None) -> str | None:
        return path if path is None or path in SPLITS_BESIDE else str(Path(path).resolve())

    evaluation = settings.evaluation
    return dataclasses.replace(
        settings,
        data=absolute(settings.data or str(defaults.data)),
        evaluation=dataclasses.replace(
            evaluation, reference=absolute(evaluation.reference), weights=absolute(evaluation.weights)
        ),
    )


def require_same_settings(settings: Config, file: Path) -> None:
    """Keep the settings of an ablation in `file`. What was trained with others is not to be compared silently.

    Raises:
        UserError: there are others already, which differ in more than the number of steps and the like; the message
            names one.
    """
    from improved_diffusion.training.start import CHANGEABLE, require_same_run

    if file.is_file():
        changeable = {group: CHANGEABLE[group] for group in ("", "training")}
        try:
            require_same_run(load_settings(Config, file), settings, changeable)
        except UserError as error:
            raise UserError(f"{file.parent} has runs with other settings, choose another --out: {error}") from None
    with atomic_write(file) as temporary:
        temporary.write_text(yaml.safe_dump(to_plain(settings), sort_keys=False))


def train(run: Path, settings: Config, seed: int, config_file: Path | None, for_training: list[str]) -> None:
    """Train, or finish training, one run. A run that is there gets all flags again, and what a config file said, so
    that train.py refuses what it was not trained with, be it the content of the images."""
    flags = ["--loss", settings.loss, f"--seed={seed}", *for_training]
    if (run / "checkpoints" / "latest").is_file():
        steps = settings.training.steps
        command = ["--resume", str(run), *flags, f"--data={settings.data}", f"--training.steps={steps}"]
    else:
        command = ["--out", str(run), *([f"--config={config_file}"] if config_file else []), *flags]
    with subprocess.Popen([sys.executable, str(PROJECT / "train.py"), *command]) as training:
        try:
            status = training.wait()
        except KeyboardInterrupt:  # which the training has got too, and saves
            training.wait()
            raise
    if status:
        advice = "see its message above" if status == 2 else "give the command again to go on"
        raise UserError(f"the training of {run} ended with exit status {status}: {advice}")


def last_series(run: Path) -> list[dict[str, Any]]:
    """The evaluations of a run that can be compared with its last one.

    Raises:
        UserError: there are none.
    """
    from improved_diffusion.training.run_log import read_jsonl
    from improved_diffusion.training.series import evaluation_series

    scored = [record for record in read_jsonl(run / "evaluations.jsonl") if "value" in record]
    if not scored:
        raise UserError(f"{run} was never scored: an ablation needs evaluation.features")
    return evaluation_series(scored)[-1]


def require_one_protocol(runs: dict[tuple[str, int], list[dict[str, Any]]]) -> None:
    """Raise UserError where two runs were not measured in the same way."""
    from improved_diffusion.training.series import difference

    (first, (record, *_)), *others = runs.items()
    for other, (other_record, *_) in others:
        if what := difference(record, other_record):
            raise UserError(f"{first} and {other} were not measured in the same way and cannot be compared: {what}")


# ----------------------------------------------------------------------------------------------------------------------
# The comparison


def compare(curves: dict[str, list[dict[int, float]]]) -> str:
    """A markdown table of FID by step and loss, mean and standard deviation over the seeds, and the verdicts."""
    steps = sorted(set.intersection(*(set(run) for runs in curves.values() for run in runs)))
    if not steps:
        raise UserError("the runs have no evaluated step in common: give them the same evaluation.every")
    lines = ["| step | " + " | ".join(curves) + " |", "|" + " --- |" * (len(curves) + 1)]
    for step in steps:
        lines.append(
            f"| {step} | " + " | ".join(spread([run[step] for run in runs]) for runs in curves.values()) + " |"
        )
    best = {loss: [min(run[step] for step in steps) for run in runs] for loss, runs in curves.items()}
    lines.append("| best | " + " | ".join(map(spread, best.values())) + " |")
    lines += ["", *(f"- {verdict}" for verdict in verdicts(best))] if len(best) > 1 else []
    return "\n".join(lines)


def verdicts(scores: dict[str, list[float]], confidence: float = 0.95) -> list[str]:
    """For each pair of arms, whose scores (lower is better) are in the order of the seeds, which one wins.

    The intervals of all pairs hold together with `confidence` (Bonferroni's correction).
    """
    pairs = list(itertools.combinations(sorted(scores, key=lambda arm: mean(scores[arm])), 2))
    lines = []
    for better, worse in pairs:
        differences = [w - b for b, w in zip(scores[better], scores[worse], strict=True)]
        lead = f"{worse} less {better}, paired by seed: {mean(differences):.3f}"
        interval = t_interval(differences, 1 - (1 - confidence) / len(pairs))
        if interval is None:
            lines.append(f"{lead}. Not decided: one seed says nothing of the spread between seeds.")
            continue
        low, high = interval
        lead += f" ({confidence:.0%} interval {low:.3f} to {high:.3f}, {len(differences)} seeds)"
        lines.append(f"{lead}. {'Not decided: the interval holds 0.' if low <= 0 <= high else f'{better} wins.'}")
    return lines


def t_interval(differences: Sequence[float], confidence: float) -> tuple[float, float] | None:
    """Student's interval of the mean of differences between pairs; None for fewer than two."""
    n = len(differences)
    if n < 2:
        return None
    reach = stats.t.ppf((1 + confidence) / 2, n - 1) * stdev(differences) / n**0.5
    return mean(differences) - reach, mean(differences) + reach


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
