"""Choosing between fidelity and obedience: the Pareto front, the best checkpoint, and signs of overfitting.

Looks are compared with each other where their protocols are the same; these are a series.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from improved_diffusion.metrics.estimate import Score, mean_score


@dataclass(frozen=True)
class Look:
    """What was measured of one checkpoint on fixed prompts and seeds: one value for each picture."""

    step: int
    fidelity: tuple[float, ...]  # likeness to the subject
    prompt: tuple[float, ...]  # match of the prompt; empty where it could not be measured
    copying: tuple[float, ...]  # empty where it could not be measured
    protocol: str  # of what was drawn and by what it was measured

    @property
    def point(self) -> tuple[float, float]:
        """(mean fidelity, mean prompt match); 0 for what was not measured, so that the other decides."""
        return float(np.mean(self.fidelity)), float(np.mean(self.prompt)) if self.prompt else 0.0

    @property
    def copy_score(self) -> float:
        return float(np.mean(self.copying)) if self.copying else 0.0


def on_front(points: Sequence[tuple[float, float]]) -> np.ndarray:
    """bool (N,): which points no other one betters in one coordinate without being worse in the other; higher is
    better."""
    array = np.asarray(points, dtype=float).reshape(-1, 2)
    as_good = (array[:, None] >= array[None]).all(axis=-1)  # [i, j]: i is at least as good as j in both
    better = (array[:, None] > array[None]).any(axis=-1)
    return ~(as_good & better).any(axis=0)


def comparable(looks: Sequence[Look]) -> list[Look]:
    """Those that can be compared with the last one, which is among them."""
    return [look for look in looks if look.protocol == looks[-1].protocol]


def candidates(looks: Sequence[Look], copy_cap: float) -> list[Look]:
    """Those among which the best is: of each series, the Pareto front of the looks at most `copy_cap` of which is
    copied."""
    allowed = [look for look in looks if look.copy_score <= copy_cap]
    found = []
    for protocol in dict.fromkeys(look.protocol for look in allowed):
        series = [look for look in allowed if look.protocol == protocol]
        front = on_front([look.point for look in series])
        found += [look for look, is_on in zip(series, front, strict=True) if is_on]
    return found


def choose(looks: Sequence[Look], copy_cap: float) -> Look | None:
    """The look of the current series whose point lies nearest to the ideal one, each axis scaled to what the candidates
    span; the base as it was, step 0, is none of them but helps to span. None where all copy too much."""
    found = candidates(comparable(looks), copy_cap)
    trained = [look for look in found if look.step > 0]
    if not trained:
        return None
    points = np.array([look.point for look in found])
    span = np.ptp(points, axis=0)
    span[span == 0] = 1
    distances = [np.linalg.norm((points.max(axis=0) - look.point) / span) for look in trained]
    return trained[int(np.argmin(distances))]


def overfitting(looks: Sequence[Look], copy_cap: float) -> list[str]:
    """What speaks for overfitting in the last of the looks, in words; empty where nothing does.

    It is compared with every earlier look of its series after the base's, picture by picture, as prompts and seeds are
    the same: a change counts where the 95 % interval of its mean leaves out 0.
    """
    last, signs = looks[-1], []
    if last.copy_score > copy_cap:
        signs.append(
            f"step {last.step}: pictures come closer to training images than these are to each other (copy score "
            f"{last.copy_score:.2f}, the cap is {copy_cap:g}): it copies"
        )
    for earlier in reversed(comparable(looks)[:-1]):
        if earlier.step == 0 or not last.prompt or not earlier.prompt:
            continue
        gained = _change(earlier.fidelity, last.fidelity)
        lost = _change(earlier.prompt, last.prompt)
        if gained.n > 1 and gained.low > 0 and lost.high < 0:
            signs.append(
                f"step {last.step}: since step {earlier.step} fidelity rose by {gained.mean:.3f} while "
                f"prompt-following fell by {-lost.mean:.3f}: it overfits"
            )
            break
    return signs


def _change(before: Sequence[float], after: Sequence[float]) -> Score:
    return mean_score(np.subtract(after, before))
