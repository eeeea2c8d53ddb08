"""Which of several ways to train wins: Student's intervals over seeds, of runs that are compared in pairs.

A metric's own interval (`estimate.bootstrap_interval`) says how far other images would move it; what another seed would
have made of the run is only told by more runs.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from statistics import mean, stdev

from scipy import stats


def t_interval(differences: Sequence[float], confidence: float) -> tuple[float, float] | None:
    """Student's interval of the mean of differences between pairs (Student 1908); None for fewer than two."""
    n = len(differences)
    if n < 2:
        return None
    reach = stats.t.ppf((1 + confidence) / 2, n - 1) * stdev(differences) / n**0.5
    return mean(differences) - reach, mean(differences) + reach


def verdicts(scores: Mapping[str, Sequence[float]], confidence: float = 0.95) -> list[str]:
    """For each pair of arms, whose scores (lower is better) are in the order of the seeds, a line that says which wins.

    The intervals of all pairs hold together with `confidence` (Bonferroni's correction).
    """
    pairs = list(itertools.combinations(sorted(scores, key=lambda arm: mean(scores[arm])), 2))
    lines = []
    for better, worse in pairs:
        differences = [w - b for b, w in zip(scores[better], scores[worse], strict=True)]
        lead = f"{worse} less {better}, paired by seed: {mean(differences):.3f}"
        interval = t_interval(differences, 1 - (1 - confidence) / len(pairs))
        if interval is None:
            lines.append(f"{lead}. Not decided: one seed says nothing of the spread between seeds.")
            continue
        low, high = interval
        lead += f" ({confidence:.0%} interval {low:.3f} to {high:.3f}, {len(differences)} seeds)"
        lines.append(f"{lead}. {'Not decided: the interval holds 0.' if low <= 0 <= high else f'{better} wins.'}")
    return lines


def spread(values: Sequence[float]) -> str:
    """Mean and standard deviation, for a table."""
    return f"{mean(values):.3f}" + (f" ± {stdev(values):.3f}" if len(values) > 1 else "")
