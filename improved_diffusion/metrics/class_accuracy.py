"""Does an image look like its class? What a linear probe on the Inception features says."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import numpy as np

from improved_diffusion.errors import UserError
from improved_diffusion.metrics.estimate import Estimate, Influence, bootstrap_interval
from improved_diffusion.metrics.features import Features
from improved_diffusion.metrics.fid import common_classes

TOP = 5
REGULARISATION = 0.01  # scikit-learn's C, for features of unit variance
CONFUSED_PAIRS = 10


def class_accuracy(train: Features, real: Features, fake: Features, confidence: float = 0.95) -> dict[str, Estimate]:
    """The share of images that a multinomial logistic regression on the features of `train` puts into their own class,
    and the share whose own class is among its first five (where there are more than five classes).

    Returns {name: estimate}, for the `fake` images and for the `real` ones, which were not trained on and say what is
    to be had. `details` of the first have `by_class`, rows of (class, share of the fake images, low, high, share of the
    real ones, low, high), the worst first; and `confused`, rows of (class, what its fake images are taken for instead,
    their share).

    Raises:
        UserError: a side has no classes, or other ones than the training images.
    """
    names = common_classes(train, fake)
    common_classes(train, real)
    ranks_of = _probe(train)
    ranked = {"": (fake, ranks_of(fake)), " of real images": (real, ranks_of(real))}
    estimates: dict[str, Estimate] = {}
    for k in (1, TOP) if len(names) > TOP else (1,):
        for suffix, (side, ranks) in ranked.items():
            hits = _hits(ranks, side.labels, k)
            estimates[f"top-{k} accuracy{suffix}"] = _share(hits, side.labels)
    details = estimates["top-1 accuracy"].details
    details["by_class"] = _by_class(ranked.values(), names, confidence)
    details["confused"] = _confused(fake.labels, ranked[""][1][:, 0], names)
    return estimates


def _probe(train: Features) -> Callable[[Features], np.ndarray]:
    """Fit the regression; returns a function of features: (n, TOP) classes of each image, the likeliest first."""
    from sklearn.linear_model import LogisticRegression

    if len(np.unique(train.labels)) < 2:
        raise UserError(f"class-accuracy needs training images of at least two classes: {train.name} has one")
    mean, deviation = np.mean(train.array, axis=0), np.std(train.array, axis=0) + 1e-6
    regression = LogisticRegression(C=REGULARISATION, max_iter=500)
    regression.fit((train.array - mean) / deviation, train.labels)

    def ranks(side: Features) -> np.ndarray:
        scores = regression.predict_log_proba((side.array - mean) / deviation)
        return regression.classes_[np.argsort(-scores, axis=1, kind="stable")[:, :TOP]]

    return ranks


def _hits(ranks: np.ndarray, labels: np.ndarray, k: int) -> np.ndarray:
    """Whether each image's class is among the first k, as float64 (n,)."""
    return (ranks[:, :k] == labels[:, None]).any(axis=1).astype(float)


def _share(hits: np.ndarray, labels: np.ndarray | None = None) -> Estimate:
    return Estimate(float(hits.mean()), (Influence(hits, labels),), least=0, most=1)


def _by_class(sides: Iterable[tuple[Features, np.ndarray]], names: dict[int, str], confidence: float) -> list[tuple]:
    rows = []
    for label, name in names.items():
        row: list = [name]
        for side, ranks in sides:
            hits = _hits(ranks, side.labels, 1)[side.labels == label]
            if len(hits) == 0:
                row += [None, None, None]
                continue
            share = _share(hits)
            row += [share.value, *bootstrap_interval(share, confidence)]
        rows.append(tuple(row))
    return sorted(rows, key=lambda row: (row[1] is None, row[1] or 0.0))


def _confused(labels: np.ndarray, taken_for: np.ndarray, names: dict[int, str]) -> list[tuple[str, str, float]]:
    """The pairs of classes that are confused the most."""
    pairs = []
    for label in np.unique(labels):
        others, counts = np.unique(taken_for[labels == label], return_counts=True)
        shares = counts / (labels == label).sum()
        pairs += [
            (names[label], names[other], float(share))
            for other, share in zip(others, shares, strict=True)
            if other != label
        ]
    return sorted(pairs, key=lambda pair: -pair[2])[:CONFUSED_PAIRS]
