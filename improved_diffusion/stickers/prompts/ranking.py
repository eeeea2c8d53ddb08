"""Prompts in the order in which they tell sets of pictures apart, with intervals."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

REPLICATES = 2000
CONFIDENCE = 0.95


@dataclass(frozen=True)
class Ranked:
    """What one prompt makes of S sets, the best first, by each scorer."""

    prompt: str
    means: dict[str, np.ndarray]  # {scorer: (S,)}
    margins: dict[str, np.ndarray]  # {scorer: (S - 1, 3)}: of neighbouring sets, with the ends of its interval
    in_order: int  # margins above 0, of all scorers
    spread: np.ndarray  # (3,): best set less worst, with its interval, in standard deviations, the mean over scorers
    behind: np.ndarray  # (3,): by how much the first prompt's spread is wider, pictures paired


def rank(prompts: Sequence[str], scores: Mapping[str, Sequence[np.ndarray]], seed: int = 0) -> list[Ranked]:
    """Rank prompts: first those that have more neighbouring sets in order, by all scorers together; among equals those
    whose best and worst set lie further apart, in each scorer's standard deviation within sets.

    Intervals are percentile bootstraps over pictures, the same pictures being drawn for all prompts and scorers: what
    two prompts share cancels in their difference.

    Args:
        prompts: P texts.
        scores: {scorer: for each set, the best first, (N, P)}; N is at least 2 and may differ between sets.
        seed: of the resampling.
    """
    groups = [np.asarray(group).shape[0] for group in next(iter(scores.values()))]
    rng = np.random.default_rng(seed)
    weights = [rng.multinomial(n, np.full(n, 1 / n), REPLICATES) / n for n in groups]
    means, resampled, deviations = {}, {}, {}
    for name, sets in scores.items():
        sets = [np.asarray(group, np.float64) for group in sets]
        means[name] = np.stack([group.mean(axis=0) for group in sets])  # (S, P)
        resampled[name] = np.stack([_resampled(*pair) for pair in zip(sets, weights, strict=True)])  # (S, R, P)
        deviations[name] = max(np.sqrt(np.mean([group.var(axis=0, ddof=1).mean() for group in sets])), 1e-12)
    in_order = sum((-np.diff(values, axis=0) > 0).sum(axis=0) for values in means.values())
    spread, spreads = (
        np.mean([(values[name][0] - values[name][-1]) / deviations[name] for name in scores], axis=0)
        for values in (means, resampled)
    )
    order = np.lexsort((-spread, -in_order))
    first = order[0]
    return [
        Ranked(
            prompts[p],
            {name: means[name][:, p] for name in scores},
            {
                name: _interval(-np.diff(means[name][:, p]), -np.diff(resampled[name][..., p], axis=0).T)
                for name in scores
            },
            int(in_order[p]),
            _interval(spread[p], spreads[:, p]),
            _interval(spread[first] - spread[p], spreads[:, first] - spreads[:, p]),
        )
        for p in order
    ]


def _resampled(scores: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """(R, P): means of resampled pictures, spread as a variance of divisor n - 1 would have them."""
    mean, n = scores.mean(axis=0), len(scores)
    return mean + np.sqrt(n / (n - 1)) * (weights @ scores - mean)


def _interval(value: np.ndarray, resampled: np.ndarray) -> np.ndarray:
    """(..., 3): the value, and the ends of its interval; `resampled` is (R, ...)."""
    tail = (1 - CONFIDENCE) / 2
    return np.stack([value, *np.quantile(resampled, [tail, 1 - tail], axis=0)], axis=-1)
