"""How well cut-outs cut out pictures that none of them has seen: numbers with intervals, side by side, and a sheet."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image

from improved_diffusion.metrics.estimate import Estimate, Influence, bootstrap_interval
from improved_diffusion.progress import progress
from improved_diffusion.sampling.grids import make_grid
from improved_diffusion.stickers.segment.drawing import held_out_picture
from improved_diffusion.stickers.segment.measures import MEASURES, measure
from improved_diffusion.stickers.segment.pictures import Photographs, Picture

Matter = Callable[[Image.Image], np.ndarray]  # RGB -> alpha, float32 (H, W) in [0, 1]
Drawn = tuple[Image.Image, Image.Image]  # a picture and its true alpha
SHOWN = 6  # pictures of a set on the sheet


@dataclass(frozen=True)
class Score:
    """A measure of one model on the pictures of one set: the mean and its 95 % interval, over pictures."""

    pictures: str
    unseen_style: bool
    model: str
    measure: str
    mean: float
    low: float
    high: float
    n: int


def draw_held_out(
    pictures: Sequence[Picture], photographs: Photographs, count: int, size: int, seed: int
) -> list[Drawn]:
    """At most `count` pictures with their alpha, their subjects spread evenly over those held out."""
    numbers = np.unique(np.linspace(0, len(pictures) - 1, min(count, len(pictures))).round().astype(int))
    return [held_out_picture(pictures, int(number), photographs, size, seed) for number in numbers]


def measure_all(matter: Matter, drawn: Sequence[Drawn], title: str | None = None) -> dict[str, np.ndarray]:
    """{measure: (N,) values} of the N drawn pictures; `title` is that of a progress bar."""
    found = []
    with progress(total=len(drawn), desc=title, unit="picture", disable=title is None) as bar:
        for picture, truth in drawn:
            found.append(measure(matter(picture), np.asarray(truth) / 255))
            bar.update()
    return {name: np.array([values[name] for values in found]) for name in MEASURES}


def compare(
    models: Mapping[str, Matter], sets: Mapping[str, Sequence[Drawn]], unseen: Mapping[str, bool]
) -> tuple[list[Score], list[str]]:
    """The scores of each of the named models on each of the named sets; and the differences between the first model and
    each other, a line each, paired by picture."""
    scores, differences = [], []
    for name, drawn in sets.items():
        values = {model: measure_all(matter, drawn, f"{model} on {name}") for model, matter in models.items()}
        first, *others = models
        for metric in MEASURES:
            for model in models:
                score = _mean(values[model][metric])
                scores.append(Score(name, unseen[name], model, metric, *score, len(drawn)))
            for other in others:
                mean, low, high = _mean(values[first][metric] - values[other][metric])
                verdict = "not decided" if low <= 0 <= high else "beyond chance"
                interval = f"{mean:+.4f} ({low:+.4f} to {high:+.4f})"
                differences.append(f"{name}: {metric} of {first} less that of {other}: {interval}, {verdict}")
    return scores, differences


def _mean(values: np.ndarray) -> tuple[float, float, float]:
    mean = float(values.mean())
    low, high = bootstrap_interval(Estimate(mean, (Influence(values),)))
    return mean, low, high


def table(scores: Sequence[Score]) -> str:
    """A line for each set and model, as Markdown."""
    lines = [f"| pictures | n | model | {' | '.join(MEASURES)} |", "| --- | ---: | --- |" + " ---: |" * len(MEASURES)]
    for name in dict.fromkeys(score.pictures for score in scores):
        of_set = [score for score in scores if score.pictures == name]
        style = "unseen style" if of_set[0].unseen_style else "held out"
        for model in dict.fromkeys(score.model for score in of_set):
            of_model = {score.measure: score for score in of_set if score.model == model}
            cells = (f"{s.mean:.3f} ({s.low:.3f} to {s.high:.3f})" for s in (of_model[name] for name in MEASURES))
            lines.append(f"| {name}, {style} | {of_set[0].n} | {model} | {' | '.join(cells)} |")
    return "\n".join(lines)


def sheet(models: Mapping[str, Matter], sets: Mapping[str, Sequence[Drawn]]) -> np.ndarray:
    """uint8 (height, width, 3): a row for each of a few pictures of each set: the picture, the true alpha, each
    model's."""
    rows, titles = [], []
    for name, drawn in sets.items():
        for number in np.unique(np.linspace(0, len(drawn) - 1, min(SHOWN, len(drawn))).astype(int)):
            picture, truth = drawn[number]
            alphas = [np.asarray(truth) / 255, *(matter(picture) for matter in models.values())]
            greys = [np.round(255 * alpha).astype(np.uint8) for alpha in alphas]
            rows.append([np.asarray(picture), *(np.repeat(grey[..., None], 3, axis=2) for grey in greys)])
            titles.append(name)
    return make_grid(np.array(rows), tuple(titles), ("picture", "truth", *models))
