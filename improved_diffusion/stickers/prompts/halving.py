"""Which prompt draws best, by successive halving: few pictures of many prompts, then more of those that did well.

Jamieson & Talwalkar 2016, "Non-stochastic Best Arm Identification and Hyperparameter Optimization", arXiv:1502.07943.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from improved_diffusion.metrics.estimate import Score, mean_score

ROUNDS = ((200, 2), (50, 4), (12, 16))  # prompts that are left, and pictures of each

Scores = Mapping[str, np.ndarray]  # {scorer: (P prompts, n seeds)}


@dataclass(frozen=True)
class Standing:
    """How one prompt stood in the last round that it was in."""

    prompt: str
    pictures: int
    means: dict[str, float]  # {scorer: mean over the pictures}
    behind: Score  # by how much the first of the round is better, in standard deviations, pictures of one seed paired


def halve(
    prompts: Sequence[str],
    score: Callable[[list[str], int], Scores],
    rounds: Sequence[tuple[int, int]] = ROUNDS,
) -> list[Standing]:
    """All prompts, the best first; those that a round left out come after those that it kept.

    Args:
        score: gives scores of the pictures of some prompts, of as many seeds as it is told, the same for each prompt.
        rounds: (prompts, seeds) of each.
    """
    left, out = list(prompts), []
    for number, (_, seeds) in enumerate(rounds):
        standings = compare(left, score(left, seeds))
        kept = rounds[number + 1][0] if number + 1 < len(rounds) else 0
        out = standings[kept:] + out
        left = [standing.prompt for standing in standings[:kept]]
        if not left:
            break
    return out


def compare(prompts: Sequence[str], scores: Scores) -> list[Standing]:
    """The prompts of one round, the best first: by the mean of all scorers, each in its standard deviation."""
    deviations = {name: max(values.std(), 1e-12) for name, values in scores.items()}
    values = np.mean([scores[name] / deviations[name] for name in scores], axis=0)  # (P, n)
    order = np.argsort(-values.mean(axis=1), kind="stable")
    return [
        Standing(
            prompts[p],
            values.shape[1],
            {name: float(scores[name][p].mean()) for name in scores},
            mean_score(values[order[0]] - values[p]),
        )
        for p in order
    ]
