"""curves.png of a run: its loss terms and its FID against the step."""

from __future__ import annotations

import itertools

from improved_diffusion.files import atomic_write, read_jsonl
from improved_diffusion.run_directory import RunDirectory
from improved_diffusion.sampling.series import PROTOCOL, evaluation_series, protocol, shown

MARKERS = "os^Dv"


def draw_curves(run: RunDirectory) -> None:
    """Draw the mean-square error, the bound's term by quartile of t, and the FID, from the run's own records."""
    # The object interface, for no window system and no state of pyplot's is wanted in a training process.
    from matplotlib.figure import Figure

    metrics, evaluations = read_jsonl(run.metrics_file), read_jsonl(run.evaluations_file)
    figure = Figure(figsize=(15, 4))
    figure.subplots_adjust(left=0.05, right=0.99, bottom=0.13, top=0.92, wspace=0.17)  # a layout engine draws twice
    loss_axes, bound_axes, fid_axes = figure.subplots(1, 3)
    for name in ("loss", "mse"):
        _plot(loss_axes, metrics, name)
    loss_axes.set(title="Training loss", xlabel="step", yscale="log")
    for quartile in range(4):
        name = f"vlb_q{quartile}" if any("vlb" in record for record in metrics) else f"mse_q{quartile}"
        _plot(bound_axes, metrics, name)
    bound = any("vlb" in record for record in metrics)
    title = "Bound per step and quartile of t (bits/dim)" if bound else "Mean-square error by quartile of t"
    bound_axes.set(title=title, xlabel="step", yscale="log")
    _plot_evaluations(fid_axes, evaluation_series([record for record in evaluations if "value" in record]))
    fid_axes.set(title="FID of the moving average", xlabel="step", yscale="log")
    for axes in (loss_axes, bound_axes, fid_axes):
        axes.grid(alpha=0.3, which="both")
        if axes.lines:
            axes.legend()
    with atomic_write(run.curves_file) as temporary:
        figure.savefig(temporary, format="png", dpi=100)


def _plot_evaluations(axes, all_series: list[list[dict]]) -> None:
    """A line of its own, with its own marker, for each series; the legend says in what they differ."""
    protocols = [protocol(series[0]) for series in all_series]
    varying = [name for name in PROTOCOL if len({str(p[name]) for p in protocols}) > 1]
    for marker, series, settings in zip(itertools.cycle(MARKERS), all_series, protocols, strict=False):
        label = ", ".join([series[0]["metric"], *(f"{name} {shown(settings[name])}" for name in varying)])
        steps = [r["step"] for r in series]
        axes.plot(steps, [r["value"] for r in series], f"{marker}-", label=label)
        bounds = [[r.get(bound) or r["value"] for r in series] for bound in ("low", "high")]
        axes.fill_between(steps, *bounds, alpha=0.2)


def _plot(axes, records: list[dict], name: str) -> None:
    points = [(record["step"], record[name]) for record in records if name in record]
    if points:
        axes.plot(*zip(*points, strict=True), label=name, linewidth=1)
