"""What comes of a sweep: tables, contact sheets, the Pareto front.

OUT/runs/            runs that the sweep trained
OUT/pictures/        one for each point of the grid, prompt and seed; what is there is not drawn again
OUT/scores.csv       a row for each picture
OUT/summary.csv      a row for each point of the grid, with intervals, and whether it is on the Pareto front
OUT/prompts.csv        a row for each point and prompt
OUT/sheet.png        a row for each point, a column for each prompt (first seed); OUT/sheets/: all seeds of a prompt
OUT/pareto.png       likeness against prompt match
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from improved_diffusion.files import atomic_write
from improved_diffusion.metrics.estimate import mean_score
from improved_diffusion.personalize.measuring.choice import on_front
from improved_diffusion.personalize.measuring.sheet import contact_sheet
from improved_diffusion.personalize.studies.sweep import Drawn, Point
from improved_diffusion.results import write_csv
from improved_diffusion.sampling.grids import save_png

SCORES = ("clip_t", "clip_i", "likeness", "copying")


def by_point(drawn: Sequence[Drawn]) -> dict[Point, list[Drawn]]:
    """The pictures of each point, in the order of the grid."""
    grouped: dict[Point, list[Drawn]] = {}
    for picture in drawn:
        grouped.setdefault(picture.point, []).append(picture)
    return grouped


def summarise(drawn: Sequence[Drawn]) -> list[dict[str, Any]]:
    """A row for each point: its settings, the mean of each score with its interval, and whether it is on the front.

    A score that a point lacks and others have (copying, of a run with one training image) is None."""
    names = _scores_of(drawn)
    rows = [{**_settings(point), **_means(pictures, names)} for point, pictures in by_point(drawn).items()]
    fidelity = "likeness" if "likeness" in rows[0] else "clip_i"
    if "clip_t" in rows[0] and fidelity in rows[0]:
        front = on_front([(row[fidelity], row["clip_t"]) for row in rows])
        rows = [{**row, "on_front": bool(is_on)} for row, is_on in zip(rows, front, strict=True)]
    return rows


def summarise_prompts(drawn: Sequence[Drawn]) -> list[dict[str, Any]]:
    """A row for each point and prompt, with the means over its seeds."""
    names, rows = _scores_of(drawn), []
    for point, pictures in by_point(drawn).items():
        for prompt in dict.fromkeys(picture.prompt for picture in pictures):
            of_prompt = [picture for picture in pictures if picture.prompt == prompt]
            rows.append({**_settings(point), "prompt": prompt, **_means(of_prompt, names)})
    return rows


def _means(pictures: Sequence[Drawn], names: Sequence[str]) -> dict[str, Any]:
    """How many pictures, and the mean of each score with its interval; None where no picture has it."""
    row: dict[str, Any] = {"n": len(pictures)}
    for name in names:
        row |= dict.fromkeys((name, f"{name}_low", f"{name}_high"))
        if values := [picture.scores[name] for picture in pictures if name in picture.scores]:
            score = mean_score(values)
            row |= {name: score.mean, f"{name}_low": score.low, f"{name}_high": score.high}
    return row


def _scores_of(drawn: Sequence[Drawn]) -> list[str]:
    """The scores that any picture has."""
    return [name for name in SCORES if any(name in picture.scores for picture in drawn)]


def _settings(point: Point) -> dict[str, Any]:
    return {
        "run": point.run.name,
        "checkpoint": point.checkpoint,
        "unet_scale": point.unet_scale,
        "text_encoder_scale": point.text_encoder_scale,
        "guidance_scale": point.guidance_scale,
    }


def write_results(drawn: Sequence[Drawn], summary: Sequence[dict[str, Any]], out: Path) -> None:
    """Both tables, the contact sheets and the plot."""
    names = _scores_of(drawn)
    rows = [
        {
            **_settings(p.point),
            "prompt": p.prompt,
            "seed": p.seed,
            **{name: p.scores.get(name) for name in names},
            "file": str(p.file.relative_to(out)),
        }
        for p in drawn
    ]
    write_csv(out / "scores.csv", rows)
    write_csv(out / "summary.csv", summary)
    write_csv(out / "prompts.csv", summarise_prompts(drawn))
    _draw_sheets(drawn, [f"{number}: {_title(row)}" for number, row in enumerate(summary)], out)
    if "on_front" in summary[0]:
        _plot_front(summary, out / "pareto.png")


def _draw_sheets(drawn: Sequence[Drawn], titles: Sequence[str], out: Path) -> None:
    """One with all prompts, of the first seed; and one for each prompt with all seeds."""
    grouped = by_point(drawn)
    first = next(iter(grouped.values()))
    seeds = list(dict.fromkeys(picture.seed for picture in first))
    files = [[picture.file for picture in pictures] for pictures in grouped.values()]
    per_prompt = len(seeds)
    # The prompts of two runs may name their subjects differently; their numbers are the same.
    prompts = [picture.prompt for picture in first[::per_prompt]]
    save_png(contact_sheet([row[::per_prompt] for row in files], titles, prompts), out / "sheet.png")
    for number in range(len(prompts)):
        rows = [row[number * per_prompt : (number + 1) * per_prompt] for row in files]
        sheet = contact_sheet(rows, titles, [f"seed {seed}" for seed in seeds])
        save_png(sheet, out / "sheets" / f"{number:02d}.png")


def _plot_front(summary: Sequence[dict[str, Any]], file: Path) -> None:
    from matplotlib.figure import Figure

    fidelity = "likeness" if "likeness" in summary[0] else "clip_i"
    figure = Figure(figsize=(7, 5), layout="constrained")
    ax = figure.subplots()
    for number, row in enumerate(summary):
        x, y = row["clip_t"], row[fidelity]
        error = {}
        if row["n"] > 1:
            error["xerr"] = [[max(0, x - row["clip_t_low"])], [max(0, row["clip_t_high"] - x)]]
            error["yerr"] = [[max(0, y - row[f"{fidelity}_low"])], [max(0, row[f"{fidelity}_high"] - y)]]
        ax.errorbar(x, y, **error, fmt="o", color="C1" if row["on_front"] else "C0", alpha=0.8, elinewidth=0.8)
        ax.annotate(str(number), (x, y), textcoords="offset points", xytext=(5, 5))
    front = sorted((row["clip_t"], row[fidelity]) for row in summary if row["on_front"])
    ax.plot(*zip(*front, strict=True), "--", color="C1", label="Pareto front")
    ax.set(xlabel="prompt match (CLIP-T)", ylabel=f"fidelity ({fidelity})")
    ax.legend()
    with atomic_write(file) as temporary:
        figure.savefig(temporary, dpi=110, format="png")


def table(summary: Sequence[dict[str, Any]]) -> str:
    """One line for each point, numbered as in the sheets and the plot; * marks the Pareto front."""
    names = [name for name in SCORES if name in summary[0]]
    width = max(len(_title(row)) for row in summary)
    lines = [f"{'':>3}  {'':{width}}  " + "  ".join(f"{name:>8}" for name in names)]
    for number, row in enumerate(summary):
        mark = "*" if row.get("on_front") else " "
        values = "  ".join(f"{'' if row[name] is None else format(row[name], '.4f'):>8}" for name in names)
        lines.append(f"{number:>3}{mark} {_title(row):{width}}  {values}".rstrip())
    return "\n".join(lines)


def _title(row: dict[str, Any]) -> str:
    settings = f"UNet {row['unet_scale']:g}, text {row['text_encoder_scale']:g}, guidance {row['guidance_scale']:g}"
    return f"{row['run']} {row['checkpoint'].removesuffix('.pt')}, {settings}"
