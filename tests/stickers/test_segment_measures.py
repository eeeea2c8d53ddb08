"""The measures of a cut-out against independent answers."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from sklearn.metrics import jaccard_score, mean_absolute_error

from improved_diffusion.stickers.segment.evaluation import compare, table
from improved_diffusion.stickers.segment.measures import boundary_f, intersection_over_union, measure

MASKS = hnp.arrays(bool, (9, 11))


@given(MASKS, MASKS)
def test_iou_is_the_jaccard_score(mask, truth):
    expected = jaccard_score(truth.ravel(), mask.ravel(), zero_division=1.0)
    assert intersection_over_union(mask, truth) == pytest.approx(expected)


def slow_boundary(mask: np.ndarray) -> list[tuple[int, int]]:
    """Pixels of a mask with one of the four beside them, in the picture, outside of it."""
    height, width = mask.shape
    around = ((0, 1), (1, 0), (0, -1), (-1, 0))
    return [
        (y, x)
        for y, x in zip(*np.nonzero(mask), strict=True)
        if any(0 <= y + j < height and 0 <= x + i < width and not mask[y + j, x + i] for j, i in around)
    ]


@settings(deadline=None)
@given(MASKS, MASKS)
def test_boundary_f_counts_the_pixels_that_are_near_one_of_the_other(mask, truth):
    first, second = slow_boundary(mask), slow_boundary(truth)
    reach = 1  # 0.008 of a diagonal of 14, rounded up

    def near(pixels, others):
        return np.mean([any(np.hypot(y - j, x - i) <= reach for j, i in others) for y, x in pixels])

    if first and second:
        precision, recall = near(first, second), near(second, first)
        expected = 2 * precision * recall / (precision + recall) if precision + recall else 0.0
    else:
        expected = float(bool(first) == bool(second))
    assert boundary_f(mask, truth) == pytest.approx(expected)


def test_boundary_f_by_hand():
    """At 128 pixels a side the reach is 2: a square moved by 2 pixels is found, one moved by 40 is not."""
    square = np.zeros((128, 128), bool)
    square[30:60, 30:60] = True
    assert boundary_f(np.roll(square, 2, axis=1), square) == 1
    assert boundary_f(np.roll(square, 40, axis=1), square) == 0
    assert 0 < boundary_f(np.roll(square, 3, axis=1), square) < 1


@given(
    hnp.arrays(np.float32, (5, 7), elements=st.floats(0, 1, width=32)),
    hnp.arrays(np.float64, (5, 7), elements=st.floats(0, 1)),
)
def test_alpha_errors(alpha, truth):
    found = measure(alpha, truth)
    assert found["MAE"] == pytest.approx(mean_absolute_error(truth.ravel(), alpha.ravel()))
    assert found["SAD"] == pytest.approx(found["MAE"] * 35 / 1000)


def test_the_comparison_knows_which_model_is_better_and_how_sure_that_is():
    from PIL import Image

    def drawn(number):
        truth = np.zeros((16, 16), np.uint8)
        truth[4:12, 2 : 6 + number] = 255
        return Image.fromarray(truth).convert("RGB"), Image.fromarray(truth)

    def good(picture):
        return np.asarray(picture.convert("L"), np.float32) / 255

    def poor(picture):
        return np.roll(good(picture), 2, axis=1)

    sets = {"icons": [drawn(number) for number in range(8)]}
    scores, differences = compare({"good": good, "poor": poor}, sets, {"icons": True})
    by_name = {(score.model, score.measure): score for score in scores}
    assert by_name["good", "IoU"].mean == 1
    assert by_name["good", "MAE"].mean == 0
    poor_iou = np.mean([(2 + number) / (6 + number) for number in range(8)])  # columns shared, columns of both
    assert by_name["poor", "IoU"].mean == pytest.approx(poor_iou)
    assert by_name["poor", "IoU"].low < poor_iou < by_name["poor", "IoU"].high
    assert differences[0].startswith("icons: IoU of good less that of poor: +")
    assert "beyond chance" in differences[0]
    assert "| icons, unseen style | 8 | good | 1.000 (1.000 to 1.000) |" in table(scores)
