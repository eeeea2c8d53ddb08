"""Measurements for people: a table, and plots."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from improved_diffusion.files import atomic_write
from improved_diffusion.metrics.images.opening import open_image
from improved_diffusion.metrics.images.sources import Source
from improved_diffusion.metrics.measure import Measurement

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

WORST_CLASSES = 10  # rows of the table; the plot and the JSON have all
SHOWN_PAIRS = 32


def table(measurements: Sequence[Measurement]) -> str:
    """One line for each number, with its interval, n and d; then what else there is to say, each thing once."""
    of_classes = [m for m in measurements if m.class_name is not None]
    rows = [m for m in measurements if m.class_name is None] + of_classes[:WORST_CLASSES]
    width = max(len(m.metric) for m in rows)
    percent = f"{100 * rows[0].confidence:g}%"
    lines = [f"{'':{width}}  {'value':>10}  {percent + ' interval':>22}  {'n real':>8}  {'n fake':>8}  {'d':>5}"]
    for m in rows:
        digits = 6 if m.metric.startswith("KID") else 4
        interval = "" if m.low is None else f"{m.low:.{digits}f} to {m.high:.{digits}f}"
        counts = ["" if m.metric == "Inception Score" and n is None else _count(n) for n in (m.n_real, m.n_fake)]
        value = f"{m.value:10.{digits}f}"
        lines.append(f"{m.metric:{width}}  {value}  {interval:>22}  {counts[0]:>8}  {counts[1]:>8}  {m.features:5}")
    if len(of_classes) > WORST_CLASSES:
        lines.append(f"({len(of_classes) - WORST_CLASSES} classes more, all of them better)")
    notes: dict[str, list[str]] = {}
    for m in rows:
        for note in m.notes:
            notes.setdefault(note, []).append(m.metric)
    lines += [f"note: {', '.join(metrics)}: {note}" for note, metrics in notes.items()]
    lines += [remark for m in rows if (remark := _remark(m))]
    lines.append(_settings(rows[0]))
    return "\n".join(lines)


def _count(n: int | None) -> str:
    return "?" if n is None else f"{n:,}"


def _remark(m: Measurement) -> str:
    """What is particular to a metric."""
    details = m.details
    if "subset_std" in details:
        return (
            f"{m.metric} of {details['subsets']} subsets of {details['subset_size']:,}: mean "
            f"{details['subset_mean']:.5f}, standard deviation {details['subset_std']:.5f}"
        )
    if "split_std" in details:
        return (
            f"{m.metric} of {details['splits']} splits: mean {details['split_mean']:.3f}, standard deviation "
            f"{details['split_std']:.3f}"
        )
    if "points" in details:
        points = ", ".join(f"{value:.4f} at {n:,}" for n, value in details["points"])
        return f"{m.metric}: {points}; bias {details['bias']:.4f}"
    if "confused" in details:
        worst = ", ".join(
            f"{row[0]} {row[1]:.2f} (real {row[4]:.2f})" for row in details["by_class"][:5] if None not in row
        )
        pairs = ", ".join(f"{name} for {other} {share:.2f}" for name, other, share in details["confused"][:5])
        return f"{m.metric}, the worst classes: {worst}; taken for another: {pairs}"
    if "held_out" in details:
        return (
            f"{m.metric}: {details['held_out']:.4f} of the real images, which no one could memorise, are as close to "
            f"the training set; near copies: {details['near_copies']:.4f} of the fake images"
        )
    return ""


def _settings(m: Measurement) -> str:
    if m.weights_hash is None:
        return "made with unknown weights and preprocessing"
    return f"preprocessing {m.preprocessing}, {m.precision}, weights {m.weights_hash[:12]}"


def plot(measurements: Sequence[Measurement], path: Path) -> None:
    """Draw what there is to draw: FID against n with its band, shares with their intervals, bars of the classes."""
    from matplotlib.figure import Figure

    extrapolated = [m for m in measurements if "points" in m.details]
    shares = [m for m in measurements if m.metric in ("precision", "recall", "density", "coverage")]
    classes = [m for m in measurements if m.class_name is not None]
    drawings = [(draw, of) for draw, of in [(_against_n, extrapolated), (_bars, shares), (_classes, classes)] if of]
    if not drawings:
        return
    heights = [max(3.0, 0.16 * len(of)) if draw is _classes else 3.0 for draw, of in drawings]
    figure = Figure(figsize=(7, sum(heights)), layout="constrained")
    axes = figure.subplots(len(drawings), squeeze=False, height_ratios=heights)
    for (draw, of), ax in zip(drawings, axes[:, 0], strict=True):
        draw(ax, of)
    _save(figure, path)


def _against_n(ax: Axes, measurements: Sequence[Measurement]) -> None:
    for m in measurements:
        n, values = map(np.array, zip(*m.details["points"], strict=True))
        x = 1 / n
        band = np.array([m.low, m.high]) - m.value
        line = np.polynomial.Polynomial.fit([0, x[0]], [m.value, m.value + m.details["bias"]], 1)
        reach = np.array([0, x.max()])
        ax.fill_between(reach, line(reach) + band[0], line(reach) + band[1], alpha=0.2, label=f"{m.confidence:.0%}")
        ax.plot(reach, line(reach), "--", color="C0")
        ax.plot(x, values, "o", color="C0")
        ax.plot(0, m.value, "*", color="C1", markersize=12, label=f"{m.metric} {m.value:.3f}")
    ax.set_xticks([0, *x], ["endless", *(f"{count:,}" for count in n)])
    ax.set_xlabel("images (spaced as 1/n)")
    ax.set_ylabel(measurements[0].metric.removesuffix("-infinity"))
    ax.legend()


def _bars(ax: Axes, measurements: Sequence[Measurement]) -> None:
    values = np.array([m.value for m in measurements])
    errors = _errors(measurements)
    ax.bar([m.metric for m in measurements], values, yerr=errors, capsize=4)
    ax.set_ylim(0, max(1.0, 1.1 * (values + errors[1]).max()))


def _errors(measurements: Sequence[Measurement]) -> np.ndarray:
    """(2, n): how far the intervals reach below and above the values, which percentiles need not enclose."""
    errors = [[m.value - m.low for m in measurements], [m.high - m.value for m in measurements]]
    return np.clip(errors, 0, None)


def _classes(ax: Axes, measurements: Sequence[Measurement]) -> None:
    worst_last = measurements[::-1]
    names = [m.class_name.replace("$", r"\$") for m in worst_last]
    ax.barh(names, [m.value for m in worst_last], xerr=_errors(worst_last), error_kw={"elinewidth": 0.8})
    ax.tick_params(axis="y", labelsize=7)
    ax.margins(y=0.01)
    ax.set_xlabel(measurements[0].metric.split(" of ")[0])


def plot_pairs(measurement: Measurement, fake: Source, train: Source, path: Path) -> None:
    """The generated images that lie closest to training images, each above its neighbour, the most suspicious first."""
    from matplotlib.figure import Figure

    pairs = measurement.details["closest"][:SHOWN_PAIRS]
    columns = 8
    rows = -(-len(pairs) // columns)
    figure = Figure(figsize=(1.2 * columns, 2.75 * rows), layout="constrained")
    axes = figure.subplots(2 * rows, columns, squeeze=False)
    for ax in axes.flat:
        ax.axis("off")
    for position, (generated, trained, ratio) in enumerate(pairs):
        row, column = divmod(position, columns)
        axes[2 * row, column].imshow(open_image(fake, generated))
        axes[2 * row, column].set_title(f"{ratio:.2f}", fontsize=8)
        axes[2 * row + 1, column].imshow(open_image(train, trained))
    figure.suptitle(
        "generated above, nearest training image below; distance over that image's own neighbour's", fontsize=9
    )
    _save(figure, path)


def _save(figure: Figure, path: Path) -> None:
    with atomic_write(path) as temporary:
        figure.savefig(temporary, dpi=110, format=path.suffix.lstrip(".").lower() or "png")
