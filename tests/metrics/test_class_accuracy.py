"""The share of images that look like their class, to a linear probe."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.stats import norm

from improved_diffusion.errors import UserError
from improved_diffusion.metrics import FeatureSets, measure
from improved_diffusion.metrics.class_accuracy import class_accuracy
from improved_diffusion.metrics.report import table

NAMES = tuple(f"dish_{label}" for label in range(8))


@pytest.fixture
def drawn(make_features):
    """Features of `n` images: noise about the centre of the class that they show, which is their own but for the
    `shown` instead of it."""

    def draw(seed: int, n: int = 800, spread: float = 1.0, shown: dict[int, int] | None = None):
        rng = np.random.default_rng(seed)
        labels = np.arange(n) % 8
        shows = np.array([(shown or {}).get(label, label) for label in labels])
        centres = 4 * np.eye(8)[shows]
        return make_features(centres + spread * rng.normal(size=(n, 8)), labels, NAMES, name=f"set {seed}")

    return draw


def test_the_share_is_that_of_the_best_linear_rule(drawn):
    """Of classes at equal distances with spherical noise the best rule takes the largest feature; its share of hits is
    an integral."""
    estimates = class_accuracy(drawn(0, 8000, 2.0), drawn(1, 4000, 2.0), drawn(2, 4000, 2.0))
    z = np.linspace(-9, 9, 4001)
    best = np.trapezoid(norm.pdf(z) * norm.cdf(z + 2) ** 7, z)
    for name in ("top-1 accuracy", "top-1 accuracy of real images"):
        assert estimates[name].value == pytest.approx(best, abs=0.03)
    assert estimates["top-5 accuracy"].value > estimates["top-1 accuracy"].value


def test_what_is_taken_for_another_class_is_named(drawn):
    fake = drawn(2, shown={3: 5})
    estimates = class_accuracy(drawn(0), drawn(1), fake)
    details = estimates["top-1 accuracy"].details
    assert estimates["top-1 accuracy"].value == pytest.approx(7 / 8, abs=0.03)
    assert estimates["top-1 accuracy of real images"].value > 0.97
    (name, other, share), *_ = details["confused"]
    assert (name, other) == ("dish_3", "dish_5")
    assert share > 0.9
    worst, value, low, high, of_real, *_ = details["by_class"][0]
    assert worst == "dish_3"
    assert 0 <= low <= value <= high < 0.1 < 0.9 < of_real


def test_the_intervals_of_the_classes_have_the_confidence_that_is_asked_for(drawn):
    sides = [drawn(seed, spread=2.0) for seed in (0, 1, 2)]
    narrow, wide = (
        class_accuracy(*sides, confidence)["top-1 accuracy"].details["by_class"] for confidence in (0.5, 0.99)
    )
    for (name, _, low, high, *_), (same, _, lower, higher, *_) in zip(narrow, wide, strict=True):
        assert name == same
        assert lower < low < high < higher


def test_as_a_metric(drawn):
    sets = FeatureSets(*({8: drawn(seed)} for seed in (1, 2, 0)))
    measured = measure(sets, ["class-accuracy"], 8)
    assert [m.metric for m in measured] == [
        *("top-1 accuracy", "top-1 accuracy of real images", "top-5 accuracy", "top-5 accuracy of real images")
    ]
    assert all(m.low <= m.value <= m.high for m in measured)
    assert "the worst classes: dish_" in table(measured)


def test_few_classes_have_no_top_five(make_features):
    rng = np.random.default_rng(0)
    sides = [make_features(rng.normal(size=(40, 4)), np.arange(40) % 2, ("a", "b")) for _ in range(3)]
    assert list(class_accuracy(*sides)) == ["top-1 accuracy", "top-1 accuracy of real images"]


def test_sides_without_the_same_classes_are_refused(drawn, make_features):
    unlabelled = make_features(np.zeros((4, 8)), name="bare")
    with pytest.raises(UserError, match="bare has no classes"):
        class_accuracy(drawn(0), drawn(1), unlabelled)
    other = make_features(np.zeros((4, 8)), [0, 1, 0, 1], ("soup", "stew"), name="other")
    with pytest.raises(UserError, match="different classes"):
        class_accuracy(drawn(0), other, drawn(1))
    one = make_features(np.ones((4, 8)), [2, 2, 2, 2], NAMES, name="one")
    with pytest.raises(UserError, match="at least two classes: one has one"):
        class_accuracy(one, drawn(0), drawn(1))
