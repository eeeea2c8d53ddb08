"""What the answers to a survey say: a mean for each system and question, differences, agreement; a table and a plot."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from improved_diffusion.files import atomic_write
from improved_diffusion.metrics.estimate import bootstrap_interval
from improved_diffusion.personalize.studies.survey.form import MOST, Answers, Key
from improved_diffusion.personalize.studies.survey.ratings import contrast, krippendorff_alpha

FEW_PEOPLE = 10


@dataclass(frozen=True)
class Mean:
    """Of all answers about a system's images to a question; None where there are none."""

    system: str
    question: str
    mean: float | None
    interval: tuple[float, float] | None  # 95 %; None where the answers do not differ
    images: int
    people: int


@dataclass(frozen=True)
class Difference:
    """The first system's mean less the second's; None where one of them has none."""

    first: str
    second: str
    question: str
    mean: float | None
    interval: tuple[float, float] | None
    pairs: int  # images of one prompt in both systems, which the bootstrap draws together


@dataclass(frozen=True)
class Report:
    """All that there is to tell."""

    means: list[Mean]
    differences: list[Difference]
    agreement: dict[str, float | None]  # question -> Krippendorff's alpha
    notes: list[str]


def summarise(answers: Sequence[Answers], key: Key) -> Report:
    """The report on the answers of one person or more. People and images are resampled; see `contrast`."""
    ratings, items = to_ratings(answers, key), paired_items(key)
    system_of = np.array([image.system for image in key.images.values()])
    images_of = {system: system_of == system for system in sorted(set(system_of))}
    means, differences = [], []
    for system, own in images_of.items():
        for question, given in ratings.items():
            answered = ~np.isnan(given[:, own])
            counts = int(answered.any(axis=0).sum()), int(answered.any(axis=1).sum())
            means.append(Mean(system, question, *_with_interval(given, items, own), *counts))
    for (first, own), (second, others) in itertools.combinations(images_of.items(), 2):
        pairs = len(np.intersect1d(items[own], items[others]))
        for question, given in ratings.items():
            value = _with_interval(given, items, own, others)
            differences.append(Difference(first, second, question, *value, pairs))
    agreement = {question: krippendorff_alpha(given) for question, given in ratings.items()}
    return Report(means, differences, agreement, _notes(answers))


def _with_interval(
    ratings: np.ndarray, items: np.ndarray, *sides: np.ndarray
) -> tuple[float | None, tuple[float, float] | None]:
    estimate = contrast(ratings, items, *sides)
    if estimate is None:
        return None, None
    # The influences do not know where the scale ends.
    low, high = np.clip(bootstrap_interval(estimate), 0 if len(sides) == 1 else -MOST, MOST).tolist()
    return estimate.value, (low, high) if low < high else None


def to_ratings(answers: Sequence[Answers], key: Key) -> dict[str, np.ndarray]:
    """{question: float64 (people, images)}, the images in the key's order, NaN where a person did not answer."""
    return {
        question: np.array(
            [[person.answers.get(image, {}).get(question, np.nan) for image in key.images] for person in answers],
            np.float64,
        )
        for question in key.questions
    }


def paired_items(key: Key) -> np.ndarray:
    """int (images,): the k-th images of one prompt in the systems have the same number, all others one of their own."""
    turns: Counter[tuple[str, str]] = Counter()
    numbers: dict[tuple[str, int], int] = {}
    items = []
    for image in key.images.values():
        turn = turns[image.system, image.prompt]
        turns[image.system, image.prompt] += 1
        items.append(numbers.setdefault((image.prompt, turn), len(numbers)))
    return np.array(items)


def _notes(answers: Sequence[Answers]) -> list[str]:
    names = Counter(person.name for person in answers)
    notes = [f"{n} people are called {name!r}: leave one out if they are one" for name, n in names.items() if n > 1]
    if len(answers) == 1:
        notes.append("one person answered: there is no agreement to measure, and the intervals are over images alone")
    else:
        notes.append("intervals: people and images are resampled, independently")
        if len(answers) < FEW_PEOPLE:
            notes.append(f"{len(answers)} people are few: the intervals are rather too narrow")
    return notes


def table(report: Report) -> str:
    """One line for each mean, then for each difference, then for each question's agreement."""
    labels = [mean.system for mean in report.means] + [f"{d.first} - {d.second}" for d in report.differences]
    wide, asked = max(map(len, labels)), max(map(len, ("question", *report.agreement)))
    heading = f"  {'question':{asked}}  {'mean':>6}  {'95% interval':>16}"
    lines = [f"{'system':{wide}}{heading}  {'images':>6}  {'people':>6}"]
    for mean in report.means:
        lines.append(f"{mean.system:{wide}}  {_cells(mean, asked)}  {mean.images:6}  {mean.people:6}")
    if report.differences:
        lines += ["", f"{'difference':{wide}}{heading}  {'pairs':>6}"]
    for difference in report.differences:
        label = f"{difference.first} - {difference.second}"
        lines.append(f"{label:{wide}}  {_cells(difference, asked, '+')}  {difference.pairs:6}")
    lines += ["", f"{'question':{asked}}  agreement: Krippendorff's alpha, interval metric"]
    lines += [f"{question:{asked}}  {_number(alpha)}" for question, alpha in report.agreement.items()]
    return "\n".join([*lines, *(f"note: {note}" for note in report.notes)])


def _cells(row: Mean | Difference, asked: int, sign: str = "") -> str:
    interval = "-" if row.interval is None else " to ".join(_number(bound, sign) for bound in row.interval)
    return f"{row.question:{asked}}  {_number(row.mean, sign):>6}  {interval:>16}"


def _number(value: float | None, sign: str = "") -> str:
    return "-" if value is None else f"{value:{sign}.2f}"


def plot(report: Report, path: Path) -> None:
    """Each system's means with their intervals, question by question, as a PNG file."""
    from matplotlib.figure import Figure

    questions = list(report.agreement)
    systems = list(dict.fromkeys(mean.system for mean in report.means))
    figure = Figure(figsize=(2 + 1.6 * len(questions), 4), layout="constrained")
    axes = figure.subplots()
    for number, system in enumerate(systems):
        rows = [mean for mean in report.means if mean.system == system and mean.mean is not None]
        places = [questions.index(row.question) + 0.1 * (number - (len(systems) - 1) / 2) for row in rows]
        bounds = np.array([row.interval or (row.mean, row.mean) for row in rows]).reshape(-1, 2)
        axes.vlines(places, *bounds.T, color=f"C{number}")
        axes.plot(places, [row.mean for row in rows], "o", color=f"C{number}", label=system.replace("$", r"\$"))
    axes.set(xticks=range(len(questions)), xticklabels=questions, ylim=(-0.1, MOST + 0.1), ylabel="mean, 95% interval")
    axes.grid(axis="y", alpha=0.3)
    axes.legend()
    with atomic_write(path) as temporary:
        figure.savefig(temporary, format="png", dpi=110)
