"""Scores of embeddings, by hand and against brute force."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from improved_diffusion.metrics import similarity
from improved_diffusion.metrics.estimate import mean_score


def embeddings(n: int, seed: int = 0, d: int = 8) -> torch.Tensor:
    return F.normalize(torch.randn(n, d, generator=torch.Generator().manual_seed(seed)), dim=1)


def at_angles(*degrees: float) -> torch.Tensor:
    return torch.tensor([[math.cos(math.radians(a)), math.sin(math.radians(a))] for a in degrees])


def test_prompt_match_and_fidelity_by_hand():
    pictures, texts = at_angles(0, 90), at_angles(60, 90)
    assert similarity.prompt_match(pictures, texts).tolist() == pytest.approx([0.5, 1.0], abs=1e-6)
    assert similarity.fidelity(pictures, texts).tolist() == pytest.approx(
        [0.25, (math.cos(math.pi / 6) + 1) / 2], abs=1e-6
    )


def test_copying_by_hand():
    """Training images 20 degrees apart; a copy, one as far off as they are from each other, one in between, one far."""
    training = at_angles(0, 20, 40)
    usual = 1 - math.cos(math.radians(20))
    between = 1 - (1 - math.cos(math.radians(10))) / usual
    found = similarity.copying(at_angles(0, 60, 10, 180), training)
    assert found.tolist() == pytest.approx([1.0, 0.0, between, 0.0], abs=1e-5)


def test_copying_against_brute_force():
    pictures, training = embeddings(20), embeddings(6, seed=1)
    nearest = [min(1 - float(a @ b) for j, b in enumerate(training) if j != i) for i, a in enumerate(training)]
    usual = sorted(nearest)[2]  # torch's median of an even number is the lower one
    expected = [max(0.0, 1 - min(1 - float(p @ t) for t in training) / usual) for p in pictures]
    assert similarity.copying(pictures, training).tolist() == pytest.approx(expected, abs=1e-5)


def test_one_training_image_says_nothing_of_closeness():
    with pytest.raises(ValueError, match="at least two"):
        similarity.copying(embeddings(3), embeddings(1))


def test_drift_is_none_for_the_same_pictures():
    pictures = embeddings(5)
    assert similarity.drift(pictures, pictures).abs().max() < 1e-6
    assert similarity.drift(at_angles(0), at_angles(90)).item() == pytest.approx(1)


def test_the_mean_has_an_interval_of_the_right_width():
    values = torch.randn(400, generator=torch.Generator().manual_seed(0))
    score = mean_score(values)
    assert score.mean == pytest.approx(values.mean().item(), abs=1e-6)
    half = 1.96 * values.std().item() / 20
    assert (score.high - score.mean, score.mean - score.low) == (
        pytest.approx(half, rel=0.1),
        pytest.approx(half, rel=0.1),
    )
    assert score.n == 400
