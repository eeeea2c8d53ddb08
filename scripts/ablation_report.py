"""The report of an ablation: its rows as ablation.csv, tables with verdicts as ablation.md, curves as ablation.png."""

from __future__ import annotations

import csv
from collections import defaultdict
from collections.abc import Callable, Hashable, Mapping, Sequence
from pathlib import Path
from statistics import mean
from typing import TYPE_CHECKING, NamedTuple

from ablation_measures import Row, all_steps

from improved_diffusion.config import Config
from improved_diffusion.errors import UserError
from improved_diffusion.files import atomic_write, write_text
from improved_diffusion.metrics.verdicts import spread, verdicts
from improved_diffusion.results import markdown_table
from improved_diffusion.run_directory import RunDirectory

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Curves = dict[str, list[dict]]  # {arm: [{x: value} of each seed]}


class Section(NamedTuple):
    """A table of the report, and at which x there is a verdict."""

    title: str
    x_name: str
    curves: Curves
    judged: Sequence[Hashable]


BEST = "best"
EVERY = "all"  # the sampling steps of models that have different numbers of them


def write_report(
    rows: Sequence[Row], settings: Mapping[str, Config], out: Path, preamble: Sequence[str], by_time: bool
) -> str:
    """Write ablation.csv, ablation.md and ablation.png into `out`.

    Args:
        rows: of all runs.
        settings: of the arms.
        out: where the runs are.
        preamble: paragraphs about all of them.
        by_time: whether the runs take equally long; steps of training are then told as shares of a run.

    Returns:
        The Markdown.
    """
    with atomic_write(out / "ablation.csv") as temporary, temporary.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(Row._fields)
        writer.writerows(rows)
    machines = {entry["device"] for entry in provenance(rows, out)}
    parts = [
        "# Ablation",
        *preamble,
        f"Trained on: {'; '.join(sorted(machines))}.",
        "\n".join(table_of_runs(rows, settings)),
    ]
    for section in sections(rows, settings, by_time):
        lines = table(section.curves, section.x_name)
        parts += [f"## {section.title}", "\n".join(lines), "\n".join(judgements(section.curves, section.judged))]
    parts += [
        "Means over the seeds, ± one standard deviation. Differences are of runs of one seed; their intervals are "
        "Student's, and those of one row of a table hold together (Bonferroni), not those of different rows.",
        "![Curves: means over the seeds; bands from the lowest to the highest seed](ablation.png)",
    ]
    text = "\n\n".join(part for part in parts if part)
    write_text(out / "ablation.md", text + "\n")
    plot(rows, settings, out / "ablation.png", by_time)
    return text


def provenance(rows: Sequence[Row], out: Path) -> list[dict]:
    """What the runs say of every time that they were started or resumed."""
    runs = {(row.arm, row.seed) for row in rows}
    return [entry for arm, seed in runs for entry in RunDirectory(out / f"{arm}-seed{seed}").read_provenance()]


# ----------------------------------------------------------------------------------------------------------------------
# Tables


def table_of_runs(rows: Sequence[Row], settings: Mapping[str, Config]) -> list[str]:
    """One line for each run: what it cost, and its last checkpoint with the intervals of its metrics, at all of the
    model's sampling steps."""
    runs: dict[tuple[str, int], dict[str, Row]] = defaultdict(dict)
    for row in rows:
        if row.sampling_steps in (None, all_steps(settings[row.arm])):
            runs[row.arm, row.seed][row.metric] = row
    measured = dict.fromkeys(row.metric for row in rows if is_final(row))
    lines = []
    for (arm, seed), of in sorted(runs.items(), key=lambda item: item[0][1]):
        cells = [arm, f"{seed}", f"{of['parameters'].value:,}", f"{of['hours'].step:,}", f"{of['hours'].value:.3g}"]
        cells += [with_interval(of[metric]) if metric in of else "" for metric in measured]
        lines.append(cells)
    return markdown_table(["arm", "seed", "parameters", "steps", "hours", *measured], lines)


def is_final(row: Row) -> bool:
    """Whether it is a score of the last checkpoint."""
    return row.metric.startswith("FID") or row.metric == "bits/dim"


def with_interval(row: Row) -> str:
    return f"{row.value:.3f}" + ("" if row.low is None else f" ({row.low:.3f} to {row.high:.3f})")


def sections(rows: Sequence[Row], settings: Mapping[str, Config], by_time: bool) -> list[Section]:
    """The tables, and at which x of each there is a verdict."""
    found = []
    for metric in dict.fromkeys(row.metric for row in rows):
        if metric.startswith("FID"):
            curves = with_all_steps(curves_of(rows, metric, lambda row: row.sampling_steps), settings)
            found.append(Section(f"{metric} of the last checkpoint", "sampling steps", curves, common(curves)))
        elif metric == "bits/dim":
            curves = curves_of(rows, metric, lambda row: "bits/dim")
            found.append(Section("Bound on images of the reference, last checkpoint", "", curves, common(curves)))
        elif metric.startswith("training "):
            curves = with_best(curves_of(rows, metric, place(rows, by_time)))
            title = f"{metric.removeprefix('training ')} while training"
            found.append(Section(title, place_name(by_time), curves, [BEST]))
    return found


def curves_of(rows: Sequence[Row], metric: str, x: Callable[[Row], Hashable]) -> Curves:
    """Of one metric; an arm that has none of it is left out."""
    runs: dict[str, dict[int, dict]] = defaultdict(lambda: defaultdict(dict))
    for row in rows:
        if row.metric == metric:
            runs[row.arm][row.seed][x(row)] = row.value
    return {arm: [seeds[seed] for seed in sorted(seeds)] for arm, seeds in runs.items()}


def place(rows: Sequence[Row], by_time: bool) -> Callable[[Row], int]:
    """Where in its training a row was taken: at a step, or after a share of it."""
    last = {(row.arm, row.seed): row.step for row in rows if row.metric == "hours"}
    return lambda row: round(100 * row.step / last[row.arm, row.seed]) if by_time else row.step


def place_name(by_time: bool) -> str:
    return "% of the training" if by_time else "step"


def with_all_steps(curves: Curves, settings: Mapping[str, Config]) -> Curves:
    """With a further row for all of a model's own sampling steps, where that is not the same number for all arms."""
    own = {arm: all_steps(settings[arm]) for arm in curves}
    if len(set(own.values())) == 1:
        return curves
    return {arm: [{**run, EVERY: run[own[arm]]} for run in runs] for arm, runs in curves.items()}


def with_best(curves: Curves) -> Curves:
    """With a further row for the lowest value of each run, among the steps that all of them have.

    Raises:
        UserError: there are no such steps.
    """
    steps = common(curves)
    if not steps:
        raise UserError("the runs have no evaluated step in common: give them the same evaluation.every")
    return {arm: [{**run, BEST: min(run[step] for step in steps)} for run in runs] for arm, runs in curves.items()}


def common(curves: Curves) -> list:
    """Where all runs of all arms have a value."""
    runs = [run for runs in curves.values() for run in runs]
    return [x for x in runs[0] if all(x in run for run in runs)]


def table(curves: Curves, x_name: str) -> list[str]:
    """A Markdown table: a column for each arm, a line for each x that all runs have."""
    rows = [[f"{x}", *(spread([run[x] for run in runs]) for runs in curves.values())] for x in common(curves)]
    return markdown_table([x_name, *curves], rows)


def judgements(curves: Curves, judged: Sequence[Hashable]) -> list[str]:
    """The verdicts at each x that is `judged`."""
    lines = []
    for x in judged if len(curves) > 1 else ():
        scores = {arm: [run[x] for run in runs] for arm, runs in curves.items()}
        lines += [f"- {x}: {verdict}" for verdict in verdicts(scores)]
    return lines


# ----------------------------------------------------------------------------------------------------------------------
# Curves


def plot(rows: Sequence[Row], settings: Mapping[str, Config], file: Path, by_time: bool) -> None:
    """A panel for each metric, in it a colour for each arm: the mean over the seeds, and a band from the lowest to the
    highest of them."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogFormatter, NullLocator

    panels = []  # title, name of x, curves
    for metric in dict.fromkeys(row.metric for row in rows):
        if metric in ("loss", "mse") or metric.startswith("training "):
            curves = curves_of(rows, metric, place(rows, by_time))
            panels.append((f"{metric.removeprefix('training ')} while training", place_name(by_time), curves))
        elif metric.startswith("FID"):
            curves = curves_of(rows, metric, lambda row: row.sampling_steps)
            panels.append((f"{metric} of the last checkpoint", "sampling steps", curves))
        elif metric == "L_t":
            curves = curves_of(rows, metric, lambda row: row.t / all_steps(settings[row.arm]))
            panels.append(("Bound by timestep, bits/dim", "t / T", curves))
    figure = Figure(figsize=(15, 4 * -(-len(panels) // 3)), layout="constrained")
    axes = list(figure.subplots(-(-len(panels) // 3), 3, squeeze=False).flat)
    for ax, (title, x_name, curves) in zip(axes, panels, strict=False):
        draw(ax, curves, list(settings))
        ax.set(title=title, xlabel=x_name, yscale="log")
        if x_name == "sampling steps":
            ax.set_xscale("log")
            ax.set_xticks(sorted({x for runs in curves.values() for run in runs for x in run}))
            ax.xaxis.set_minor_locator(NullLocator())
            ax.xaxis.set_major_formatter("{x:g}")
        ax.yaxis.set_major_formatter("{x:g}")
        ax.yaxis.set_minor_formatter(LogFormatter())
    for ax in axes[len(panels) :]:
        ax.axis("off")
    with atomic_write(file) as temporary:
        figure.savefig(temporary, format="png", dpi=110)


def draw(ax: Axes, curves: Curves, arms: Sequence[str]) -> None:
    """The curves of one panel; `arms` are all, in the order of their colours."""
    for arm, runs in curves.items():
        xs = common({arm: runs})
        columns = [[run[x] for run in runs] for x in xs]
        colour = f"C{arms.index(arm)}"
        ax.plot(xs, [mean(column) for column in columns], "o-"[len(xs) > 40 :], color=colour, label=arm, markersize=4)
        ax.fill_between(xs, [min(c) for c in columns], [max(c) for c in columns], color=colour, alpha=0.2, linewidth=0)
    ax.grid(alpha=0.3, which="both")
    ax.legend()
