from __future__ import annotations

import numpy as np
import pytest

from improved_diffusion.data.synthetic import CLASS_NAMES, draw, draw_set
from improved_diffusion.errors import UserError

MEAN_COLOURS = {
    "chocolate_cake": (143.56, 137.83, 132.92),
    "creme_brulee": (109.85, 67.73, 40.52),
    "cup_cakes": (146.94, 140.40, 134.96),
    "donuts": (118.28, 102.62, 90.00),
    "edamame": (138.62, 160.47, 122.85),
    "french_fries": (119.32, 107.26, 87.83),
    "hamburger": (141.27, 118.72, 81.83),
    "hot_dog": (162.43, 141.68, 107.47),
    "ice_cream": (188.49, 185.43, 189.24),
    "macarons": (69.90, 81.33, 63.26),
    "pancakes": (143.93, 134.50, 110.13),
    "pizza": (178.61, 152.83, 106.25),
    "spaghetti_bolognese": (170.72, 160.93, 134.14),
    "strawberry_shortcake": (182.79, 165.00, 144.36),
    "sushi": (152.80, 84.76, 69.01),
    "waffles": (175.35, 142.81, 110.51),
}


@pytest.fixture(scope="module")
def train() -> tuple[np.ndarray, np.ndarray]:
    return draw_set(0, 40)


@pytest.fixture(scope="module")
def held_out() -> tuple[np.ndarray, np.ndarray]:
    return draw_set(0, 20, first_index=1000)


def coarse(images: np.ndarray) -> np.ndarray:
    """(N, 64, 64, 3) -> (N, 193): 8x8 box means and a constant."""
    means = images.reshape(-1, 8, 8, 8, 8, 3).mean((2, 4)).reshape(len(images), -1) / 255 - 0.5
    return np.concatenate([means, np.ones((len(images), 1))], 1)


def test_class_names_are_sorted_and_distinct():
    assert list(CLASS_NAMES) == sorted(set(CLASS_NAMES))
    assert len(CLASS_NAMES) >= 12
    assert "creme_brulee" in CLASS_NAMES


@pytest.mark.parametrize("class_name", CLASS_NAMES)
def test_picture_depends_on_its_arguments_alone(class_name: str):
    first = draw(3, class_name, 7)
    assert first.shape == (64, 64, 3)
    assert first.dtype == np.uint8
    np.random.seed(0)
    for other in ("pizza", class_name):
        draw(1, other, 0)
    np.testing.assert_array_equal(draw(3, class_name, 7), first)
    for seed, index in [(4, 7), (3, 8), (7, 3)]:
        assert np.abs(draw(seed, class_name, index).astype(int) - first).mean() > 5


def test_set_holds_the_single_pictures_class_after_class():
    images, labels = draw_set(5, 2, first_index=9)
    assert images.shape == (2 * len(CLASS_NAMES), 64, 64, 3)
    assert images.dtype == np.uint8
    assert labels.dtype == np.int64
    np.testing.assert_array_equal(labels, np.repeat(np.arange(len(CLASS_NAMES)), 2))
    for position in (0, 1, 12, 31):
        expected = draw(5, CLASS_NAMES[labels[position]], 9 + position % 2)
        np.testing.assert_array_equal(images[position], expected)


def test_pictures_are_the_published_ones():
    """Mean colours, so that a last-bit difference between numpy builds passes and another picture does not."""
    for class_name, mean in MEAN_COLOURS.items():
        np.testing.assert_allclose(draw(0, class_name, 0).mean((0, 1)), mean, atol=0.3, err_msg=class_name)


def test_pictures_use_the_whole_range_of_light(train: tuple[np.ndarray, np.ndarray]):
    images, _ = train
    dark, bright = np.percentile(images.reshape(len(images), -1), (2, 98), axis=1)
    assert (bright - dark).min() > 80
    assert (images == 255).mean() < 0.05


def test_classes_are_told_apart_by_a_linear_classifier(train, held_out):
    (x, y), (x_new, y_new) = train, held_out
    features, targets = coarse(x), np.eye(len(CLASS_NAMES))[y]
    weights = np.linalg.solve(features.T @ features + np.eye(features.shape[1]), features.T @ targets)
    right = (coarse(x_new) @ weights).argmax(1) == y_new
    assert right.mean() > 0.8
    assert np.bincount(y_new, right).min() >= 10  # of 20: no class is lost in another


def test_pictures_of_one_class_differ(train: tuple[np.ndarray, np.ndarray]):
    images, labels = train
    for label, class_name in enumerate(CLASS_NAMES):
        features = coarse(images[labels == label]) * 255
        gaps = np.sqrt(((features[:, None] - features[None]) ** 2).mean(-1))
        gaps = gaps[np.triu_indices(len(gaps), 1)]
        assert gaps.min() > 8, class_name
        assert gaps.mean() > 35, class_name


def test_unknown_class_names_the_nearest():
    with pytest.raises(UserError, match=r"'hamberger'.*hamburger"):
        draw(0, "hamberger", 0)
    with pytest.raises(UserError, match="creme_brulee.*waffles"):
        draw(0, "zzz", 0)


@pytest.mark.parametrize(("seed", "index"), [(-1, 0), (0, -1)])
def test_negative_numbers_are_refused(seed: int, index: int):
    with pytest.raises(ValueError, match="non-negative"):
        draw(seed, "pizza", index)
