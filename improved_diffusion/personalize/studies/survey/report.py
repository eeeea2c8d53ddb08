"""What the answers to a survey say: a mean for each system and question, differences, agreement; a table and a plot."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from improved_diffusion.files import atomic_write
from improved_diffusion.personalize.studies.survey.form import MOST, Answers, Key
from improved_diffusion.personalize.studies.survey.ratings import (
    crossed_resamples,
    krippendorff_alpha,
    percentile_interval,
    resampled_means,
)


@dataclass(frozen=True)
class Mean:
    """Of all answers about a system's images to a question; `mean` is None where there are none."""

    system: str
    question: str
    mean: float | None
    interval: tuple[float, float] | None  # 95 %; None where the answers do not differ
    images: int
    people: int


@dataclass(frozen=True)
class Difference:
    """The first system's mean less the second's."""

    first: str
    second: str
    question: str
    mean: float
    interval: tuple[float, float] | None
    pairs: int  # images of the same prompt in both


@dataclass(frozen=True)
class Report:
    people: int
    means: list[Mean]
    differences: list[Difference]
    agreement: dict[str, float | None]  # question -> Krippendorff's alpha
    notes: list[str]


def summarise(answers: Sequence[Answers], key: Key) -> Report:
    """Means with intervals over people and images, the differences between systems, and the people's agreement."""
    ratings = to_ratings(answers, key)
    shown = list(key.images.values())
    systems = sorted({image.system for image in shown})
    columns = {system: np.array([image.system == system for image in shown]) for system in systems}
    items = _items(key)
    resamples = crossed_resamples(len(answers), items)
    means, differences, agreement = [], [], {}
    for question, of_question in zip(key.questions, ratings, strict=True):
        agreement[question] = krippendorff_alpha(of_question)
        replicates = {}
        for system, mine in columns.items():
            given = ~np.isnan(of_question[:, mine])
            replicates[system] = resampled_means(
                of_question[:, mine], resamples._replace(images=resamples.images[:, mine])
            )
            means.append(
                Mean(
                    system,
                    question,
                    float(of_question[:, mine][given].mean()) if given.any() else None,
                    percentile_interval(replicates[system]),
                    images=int(given.any(axis=0).sum()),
                    people=int(given.any(axis=1).sum()),
                )
            )
        
