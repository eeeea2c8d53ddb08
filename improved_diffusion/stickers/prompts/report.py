"""What comes of a search for prompts.

OUT/prompts.csv    a row for each prompt, the best first, with all means, margins and intervals
OUT/prompts.md     the first and the last of them, for people
OUT/prompts.png    what the scorers make of the sets with the first and the last of them; or, where the prompts were
                   drawn from, pictures of the first
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from improved_diffusion.files import atomic_write, write_text
from improved_diffusion.metrics.estimate import Score
from improved_diffusion.personalize.measuring.sheet import contact_sheet
from improved_diffusion.results import markdown_table, write_csv
from improved_diffusion.sampling.grids import save_png
from improved_diffusion.stickers.prompts.halving import Standing
from improved_diffusion.stickers.prompts.ranking import Ranked

SHOWN = 12  # of the first prompts, in the table for people and the plot
LAST = 3  # and of the last


def write_report(ranked: Sequence[Ranked], sets: Sequence[str], out: Path) -> None:
    """All three files. `sets` are their names, the best first."""
    write_csv(out / "prompts.csv", [{"rank": i, **_row(prompt, sets)} for i, prompt in enumerate(ranked, 1)])
    write_text(out / "prompts.md", table(ranked, sets) + "\n")
    _plot(ranked, sets, out / "prompts.png")


def _row(ranked: Ranked, sets: Sequence[str]) -> dict[str, Any]:
    row: dict[str, Any] = {"prompt": ranked.prompt, "in_order": ranked.in_order}
    row |= _with_ends("spread", ranked.spread) | _with_ends("behind", ranked.behind)
    for scorer, means in ranked.means.items():
        row |= {f"{scorer}: {name}": mean for name, mean in zip(sets, means, strict=True)}
        for better, worse, margin in zip(sets, sets[1:], ranked.margins[scorer], strict=False):
            row |= _with_ends(f"{scorer}: {better} - {worse}", margin)
    return row


def _with_ends(name: str, value: np.ndarray) -> dict[str, float]:
    return dict(zip((name, f"{name}, low", f"{name}, high"), value.tolist(), strict=True))


def _shown(ranked: Sequence[Any]) -> list[int]:
    """Indices of the first and the last."""
    return sorted({*range(len(ranked))[:SHOWN], *range(len(ranked))[-LAST:]})


def table(ranked: Sequence[Ranked], sets: Sequence[str]) -> str:
    """In Markdown: the mean of each set by each scorer, the spread and how far behind the first it is, with intervals;
    * marks a margin whose interval is above 0."""
    scorers = list(ranked[0].means)
    margins = len(scorers) * (len(sets) - 1)
    head = ["", "prompt", "in order", *(f"{scorer}: {' > '.join(sets)}" for scorer in scorers), "spread", "behind"]
    rows = []
    for i in _shown(ranked):
        prompt = ranked[i]
        means = [_means(prompt, scorer) for scorer in scorers]
        behind = "" if i == 0 else _interval(prompt.behind)
        order = f"{prompt.in_order} of {margins}"
        rows.append([str(i + 1), prompt.prompt, order, *means, _interval(prompt.spread), behind])
    return "\n".join(markdown_table(head, rows))


def _means(ranked: Ranked, scorer: str) -> str:
    first, *others = ranked.means[scorer]
    sure = ["*" if low > 0 else "" for low in ranked.margins[scorer][:, 1]]
    return " / ".join([f"{first:.2f}", *(f"{mean:.2f}{mark}" for mean, mark in zip(others, sure, strict=True))])


def _interval(value: np.ndarray) -> str:
    return "{:.2f} ({:.2f} to {:.2f})".format(*value)


def _plot(ranked: Sequence[Ranked], sets: Sequence[str], file: Path) -> None:
    """For each scorer the means of the sets, a line for each prompt."""
    from matplotlib.figure import Figure

    shown = _shown(ranked)
    scorers = list(ranked[0].means)
    figure = Figure(figsize=(4 + 4 * len(scorers), 1.5 + 0.3 * len(shown)), layout="constrained")
    axes = figure.subplots(1, len(scorers), sharey=True, squeeze=False)[0]
    places = -np.arange(len(shown))
    for ax, scorer in zip(axes, scorers, strict=True):
        means = np.array([ranked[i].means[scorer] for i in shown])
        ax.hlines(places, means.min(axis=1), means.max(axis=1), color="0.8", zorder=0)
        for number, name in enumerate(sets):
            ax.scatter(means[:, number], places, s=28, color=f"C{number}", label=name)
        ax.set(xlabel=scorer)
        ax.grid(axis="x", alpha=0.3)
    axes[0].set_yticks(places, [f"{ranked[i].prompt}  {i + 1}" for i in shown])
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside upper right", ncols=len(sets))
    with atomic_write(file) as temporary:
        figure.savefig(temporary, dpi=110, format="png")


def write_standings(standings: Sequence[Standing], out: Path) -> None:
    """The two tables, of prompts that were drawn from."""
    rows = [
        {
            "rank": i,
            "prompt": standing.prompt,
            "pictures": standing.pictures,
            **standing.means,
            "behind": standing.behind.mean,
            "behind, low": standing.behind.low,
            "behind, high": standing.behind.high,
        }
        for i, standing in enumerate(standings, 1)
    ]
    write_csv(out / "prompts.csv", rows)
    write_text(out / "prompts.md", standings_table(standings) + "\n")


def standings_table(standings: Sequence[Standing]) -> str:
    """In Markdown: pictures, the mean of each scorer, and how far behind the first of its round each is."""
    scorers = list(standings[0].means)
    rows = []
    for i in _shown(standings):
        standing = standings[i]
        means = [f"{standing.means[scorer]:.2f}" for scorer in scorers]
        behind = "" if i == 0 else _score(standing.behind)
        rows.append([str(i + 1), standing.prompt, str(standing.pictures), *means, behind])
    return "\n".join(markdown_table(["", "prompt", "pictures", *scorers, "behind"], rows))


def _score(score: Score) -> str:
    return _interval(np.array([score.mean, score.low, score.high]))


def write_first_pictures(pictures: Mapping[str, Sequence[Path]], out: Path) -> None:
    """A sheet with a row for each prompt."""
    columns = min(map(len, pictures.values()))
    rows = [files[:columns] for files in pictures.values()]
    save_png(contact_sheet(rows, list(pictures), [f"seed {seed}" for seed in range(columns)]), out / "prompts.png")
