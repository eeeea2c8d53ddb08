"""The front against its definition; the choice and the warnings on runs that are made up."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from improved_diffusion.personalize.measuring.choice import Look, candidates, choose, on_front, overfitting

COORDINATE = st.integers(0, 4).map(float)


@given(st.lists(st.tuples(COORDINATE, COORDINATE), min_size=1, max_size=8))
def test_the_front_is_what_nothing_dominates(points):
    for i, (x, y) in enumerate(points):
        dominated = any(a >= x and b >= y and (a > x or b > y) for a, b in points)
        assert on_front(points)[i] == (not dominated)


def look(step: int, fidelity: float, prompt: float | None, copying: float = 0.0) -> Look:
    """Eight pictures that scatter about their means."""
    scatter = [0.01 * (i - 3.5) for i in range(8)]
    prompts = () if prompt is None else tuple(prompt + d for d in scatter)
    return Look(step, tuple(fidelity + d for d in scatter), prompts, (copying,) * 8, "usual")


BASE = look(0, 0.3, 0.32)
GOOD = look(100, 0.6, 0.31)
LATER = look(200, 0.65, 0.25)
COPIES = look(300, 0.9, 0.15, copying=0.8)


def test_the_best_is_near_both_ideals_and_copies_little():
    assert choose([BASE, GOOD, LATER, COPIES], copy_cap=0.2) == GOOD
    assert choose([BASE, GOOD, COPIES], copy_cap=1.0) == GOOD
    assert choose([BASE], copy_cap=0.2) is None  # the base is no checkpoint
    assert choose([BASE, COPIES], copy_cap=0.2) is None


def test_a_checkpoint_that_is_worse_in_both_is_never_chosen():
    assert choose([BASE, look(100, 0.5, 0.30), GOOD], copy_cap=0.2) == GOOD


def test_without_clip_fidelity_under_the_cap_decides():
    looks = [look(0, 0.3, None), look(100, 0.5, None), look(200, 0.6, None), look(300, 0.9, None, copying=0.5)]
    assert choose(looks, copy_cap=0.2).step == 200


def test_overfitting_is_said_when_it_is_seen():
    assert overfitting([BASE, GOOD], 0.2) == []
    (sign,) = overfitting([BASE, GOOD, LATER], 0.2)
    assert "fidelity rose by 0.050 while prompt-following fell by 0.060: it overfits" in sign
    copies, overfits = overfitting([BASE, GOOD, LATER, COPIES], 0.2)
    assert "copy score 0.80, the cap is 0.2" in copies
    assert "since step 200" in overfits


def test_chance_is_no_overfitting():
    """Half of the pictures up and half down: the interval of the change holds 0."""
    noisy = replace(GOOD, step=200, fidelity=tuple(x + (-1) ** i * 0.1 for i, x in enumerate(GOOD.fidelity)))
    assert overfitting([BASE, GOOD, noisy], 0.2) == []


@pytest.mark.parametrize("earlier", [GOOD, LATER])
def test_the_base_is_no_reason_to_warn(earlier):
    """Every run gains fidelity over the base, and most lose a little obedience."""
    assert overfitting([BASE, earlier], 0.2) == []


def test_looks_of_other_protocols_are_not_compared():
    """After a change of prompts, seeds or judges: scores on another scale, and of another number of pictures."""
    new = [replace(look(step, fidelity, 0.5), protocol="other") for step, fidelity in ((300, 0.1), (400, 0.2))]
    fewer = replace(new[1], fidelity=new[1].fidelity[:4], prompt=new[1].prompt[:4])
    assert choose([BASE, GOOD, new[0]], copy_cap=0.2) == new[0]
    assert choose([BASE, GOOD, *new], copy_cap=0.2) == new[1]
    assert overfitting([BASE, GOOD, fewer], 0.2) == []
    assert overfitting([BASE, GOOD, fewer, LATER], 0.2) == overfitting([BASE, GOOD, LATER], 0.2) != []
    assert candidates([BASE, GOOD, *new], copy_cap=0.2) == [BASE, GOOD, new[1]]  # nobody's checkpoint is given up
