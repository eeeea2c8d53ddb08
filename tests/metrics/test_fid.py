"""Statistics, their cache, and the distances made of them."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from PIL import Image

from improved_diffusion.errors import UserError
from improved_diffusion.metrics import FeatureStatistics, extract_features, metric_name, reference_statistics
from improved_diffusion.metrics.estimate import bootstrap_interval
from improved_diffusion.metrics.fid import fid_infinity, frechet_inception_distance, per_class
from improved_diffusion.metrics.images.sources import ArraySource
from improved_diffusion.metrics.inception.extractor import FeatureSettings
from improved_diffusion.metrics.statistics import is_statistics_file, statistics_of


def statistics(d: int = 4, n: int | None = 100, **settings: str) -> FeatureStatistics:
    chosen = {"preprocessing": "tf1", "precision": "float32", "weights_hash": "abc", **settings}
    return FeatureStatistics(
        name="some set",
        mean=torch.arange(d, dtype=torch.float64),
        cov=torch.eye(d, dtype=torch.float64),
        n=n,
        settings=FeatureSettings(features=d, **chosen),
    )


def test_statistics_equal_numpys(make_features, two_sets, monkeypatch):
    for features in (two_sets[0], two_sets[0].take(np.arange(20))):  # more than d, and fewer
        computed = statistics_of(features)
        array = features.array.astype(np.float64)
        assert computed.n == len(array)
        np.testing.assert_allclose(computed.mean, array.mean(axis=0), rtol=1e-12)
        np.testing.assert_allclose(computed.cov, np.cov(array.T), rtol=1e-9, atol=1e-12)
        np.testing.assert_allclose(computed.factor @ computed.factor.T, np.cov(array.T), rtol=1e-9, atol=1e-12)
    with pytest.raises(UserError, match="at least 2"):
        statistics_of(two_sets[0].take(np.arange(1)))


def test_saved_statistics_come_back_the_same(tmp_path):
    saved = statistics()
    saved.save(tmp_path / "statistics.npz")
    loaded = FeatureStatistics.load(tmp_path / "statistics.npz")
    assert is_statistics_file(tmp_path / "statistics.npz")
    assert (loaded.n, loaded.settings) == (saved.n, saved.settings)
    assert torch.equal(loaded.mean, saved.mean)
    assert torch.equal(loaded.cov, saved.cov)


def test_statistics_of_other_programs_are_read(tmp_path):
    np.savez(tmp_path / "other.npz", mu=np.zeros(3), sigma=np.eye(3))
    loaded = FeatureStatistics.load(tmp_path / "other.npz")
    assert (loaded.n, loaded.settings, loaded.features) == (None, None, 3)
    np.savez(tmp_path / "images-too.npz", mu=np.zeros(3), sigma=np.eye(3), arr_0=np.zeros((2, 4, 4, 3), np.uint8))
    assert not is_statistics_file(tmp_path / "images-too.npz")


@pytest.mark.parametrize(
    "arrays",
    [
        {"mu": np.zeros(3)},
        {"mu": np.zeros(3), "sigma": np.eye(4)},
        {"mu": np.array(["a"]), "sigma": np.eye(1)},
        {"mu": np.full(2, np.nan), "sigma": np.eye(2)},
        {"mu": np.zeros(2), "sigma": np.eye(2), "settings": np.str_("{}")},
    ],
)
def test_what_is_no_statistics_is_an_error(tmp_path, arrays):
    np.savez(tmp_path / "wrong.npz", **arrays)
    with pytest.raises(UserError, match=r"wrong\.npz"):
        FeatureStatistics.load(tmp_path / "wrong.npz")


def test_reference_statistics_are_cached_by_content_and_settings(extractor64, photos, unusable):
    many = np.concatenate([photos] * 6)  # more images than features
    first = reference_statistics(ArraySource("photos", many), extractor64)[64]
    again = reference_statistics(ArraySource("the same elsewhere", many.copy()), unusable(extractor64))[64]
    assert torch.equal(again.cov, first.cov)
    assert (again.name, again.n, again.settings) == ("the same elsewhere", first.n, first.settings)
    with pytest.raises(AssertionError, match="the network ran"):
        reference_statistics(ArraySource("photos", many[1:]), unusable(extractor64))
    with pytest.raises(AssertionError, match="the network ran"):
        reference_statistics(ArraySource("photos", many), unusable(extractor64, weights_hash="others"))


def test_damaged_cached_statistics_are_written_anew(extractor64, photos, cache, unusable):
    source = ArraySource("photos", np.concatenate([photos] * 6))
    first = reference_statistics(source, extractor64)[64]
    (file,) = (cache / "statistics").iterdir()
    file.write_bytes(file.read_bytes()[:1000])
    assert torch.equal(reference_statistics(source, extractor64)[64].cov, first.cov)
    assert torch.equal(reference_statistics(source, unusable(extractor64))[64].cov, first.cov)


@pytest.mark.parametrize(
    ("features", "name"), [(64, "FID64"), (192, "FID192"), (768, "FID768"), (2048, "FID"), (2023, "sFID")]
)
def test_only_2048_features_are_called_fid(features, name):
    assert metric_name(features) == name


def test_fid_of_known_statistics():
    moved = dataclasses.replace(statistics(), mean=statistics().mean + 2, cov=9 * statistics().cov, n=50)
    estimate = frechet_inception_distance(statistics(), moved)
    assert estimate.value == pytest.approx(4 * 4 + 4 * (3 - 1) ** 2)
    assert bootstrap_interval(estimate) is None


def test_statistics_that_cannot_be_compared_name_the_difference():
    with pytest.raises(UserError, match="4 features .* of 5"):
        frechet_inception_distance(statistics(4), statistics(5))
    with pytest.raises(UserError, match="weights_hash: 'abc' and 'other'"):
        frechet_inception_distance(statistics(), statistics(weights_hash="other"))
    with pytest.raises(UserError, match="preprocessing: 'tf1' and 'clean'; precision: 'float32' and 'bf16'"):
        frechet_inception_distance(statistics(), statistics(preprocessing="clean", precision="bf16"))
    with pytest.warns(UserWarning, match="does not say"):
        frechet_inception_distance(statistics(), dataclasses.replace(statistics(), settings=None))


@pytest.mark.parametrize(("n", "m"), [(300, 240), (20, 240), (300, 20), (20, 25)])
def test_few_images_are_measured_as_exactly_as_many(two_sets, n, m):
    """Against the singular values of the centred features, which need no covariance."""
    real, fake = two_sets[0].take(np.arange(n)), two_sets[1].take(np.arange(m))
    x, y = (side.array.astype(np.float64) for side in (real, fake))
    a, b = ((z - z.mean(0)).T / np.sqrt(len(z) - 1) for z in (x, y))
    expected = ((x.mean(0) - y.mean(0)) ** 2).sum() + (a**2).sum() + (b**2).sum()
    expected -= 2 * np.linalg.svd(a.T @ b, compute_uv=False).sum()
    assert frechet_inception_distance(real, fake).value == pytest.approx(expected, rel=1e-10)
    assert frechet_inception_distance(real, real).value < 1e-9


@pytest.mark.parametrize("n", [300, 80])
def test_influences_are_the_derivative_by_the_weight_of_an_image(two_sets, n):
    """Against a jackknife: leaving image i out moves the distance by about -influence / (n - 1)."""
    real, fake = two_sets[0].take(np.arange(n)), two_sets[1]
    estimate = frechet_inception_distance(real, fake)
    influence = estimate.influences[0].values - estimate.influences[0].values.mean()
    without = [
        frechet_inception_distance(real.take(np.delete(np.arange(n), i)), fake).value for i in range(min(n, 100))
    ]
    moves = -(n - 1) * (np.array(without) - np.mean(without))
    assert np.corrcoef(moves, influence[: len(moves)])[0, 1] > 0.97
    assert moves.std() == pytest.approx(influence[: len(moves)].std(), rel=0.15)


@pytest.mark.parametrize("n", [20, 31, 32, 33])
def test_about_as_many_images_as_features_still_have_a_sane_interval(make_features, n):
    """At n = d the centred features are a square factor without full rank."""
    sets, _ = gaussians(make_features, n, d=32)
    estimate = frechet_inception_distance(*sets)
    low, high = bootstrap_interval(estimate)
    assert 0.3 * estimate.value < low < high < 3 * estimate.value


def test_saved_statistics_count_as_fixed(two_sets):
    both = frechet_inception_distance(*two_sets)
    one = frechet_inception_distance(statistics_of(two_sets[0]), two_sets[1])
    assert one.value == both.value
    assert len(one.influences) == 1
    np.testing.assert_allclose(one.influences[0].values, both.influences[1].values)


def gaussians(make_features, n: int, seed: int = 0, d: int = 16):
    """Two sets, 0.1 apart in every mean and a factor 1.1 in the deviations; and their true distance."""
    rng = np.random.default_rng(seed)
    spectrum = np.arange(1, d + 1) ** -0.5
    sets = [
        make_features(scale * rng.normal(size=(n, d)) * spectrum + shift) for scale, shift in ((1.0, 0.0), (1.1, 0.1))
    ]
    return sets, d * 0.01 + 0.01 * (spectrum**2).sum()


def test_fid_infinity_removes_the_bias(make_features):
    found = [(gaussians(make_features, 100, seed)) for seed in range(100)]
    truth = found[0][1]
    biased = np.array([frechet_inception_distance(*sets).value for sets, _ in found])
    corrected = np.array([fid_infinity(*sets).value for sets, _ in found])
    error = corrected.std() / 10
    assert biased.mean() - truth > 10 * error
    assert corrected.mean() == pytest.approx(truth, abs=4 * error)


def test_fid_infinity_needs_images_and_says_what_it_saw(make_features):
    (real, fake), _ = gaussians(make_features, 170)
    details = fid_infinity(real, fake).details
    assert [n for n, _ in details["points"]] == [170, 85, 56, 42]
    assert details["points"][0][1] == frechet_inception_distance(real, fake).value
    few = fid_infinity(real.take(np.arange(60)), fake)  # parts of fewer than 2.5 images for a feature, but for one
    assert [n for n, _ in few.details["points"]] == [60, 30]
    with pytest.raises(UserError, match="at least 40 images .* has 39"):
        fid_infinity(real, fake.take(np.arange(39)))


def test_classes_are_measured_apart_and_the_worst_comes_first(make_features):
    rng = np.random.default_rng(0)
    labels = np.arange(90) % 3
    real, fake = rng.normal(size=(2, 90, 4))
    fake[labels == 2] += 3
    names = ("apple", "bread", "cake")
    sides = [make_features(x, labels, names) for x in (real, fake)]
    found = per_class(*sides)
    assert next(iter(found)) == "cake"
    for label, name in enumerate(names):
        alone = [make_features(x[labels == label]) for x in (real, fake)]
        estimate, n_real, n_fake = found[name]
        assert (n_real, n_fake) == (30, 30)
        assert estimate.value == pytest.approx(frechet_inception_distance(*alone).value)
    with pytest.raises(UserError, match="no classes"):
        per_class(sides[0], make_features(fake))
    with pytest.raises(UserError, match="different classes: cake, dip"):
        per_class(sides[0], make_features(fake, labels, ("apple", "bread", "dip")))
    with pytest.raises(UserError, match="the same in another order"):
        per_class(sides[0], make_features(fake, labels, names[::-1]))
    with pytest.raises(UserError, match="labels from 0 to 2, of 2 classes"):
        per_class(make_features(real, labels), make_features(fake, labels, names[:2]))
    with pytest.raises(UserError, match="no class has at least 2 images"):
        per_class(sides[0], make_features(fake[:2], [0, 1], names))
    with pytest.warns(UserWarning, match="1 classes have fewer than 2 images on a side and are left out: cake"):
        assert set(per_class(sides[0], make_features(fake[:5], labels[:5], names))) == {"apple", "bread"}
    assert set(per_class(make_features(real, labels + 7), make_features(fake, labels + 7))) == {"7", "8", "9"}


def test_fid_orders_degradations(extractor64, photos):
    sharp = extract_features(ArraySource("sharp", photos), extractor64)[64]
    values = []
    for radius in (1, 2, 4):
        images = np.stack([np.asarray(Image.fromarray(p).reduce(2 * radius).resize((64, 64))) for p in photos])
        coarse = extract_features(ArraySource("coarse", images), extractor64)[64]
        values.append(frechet_inception_distance(sharp, coarse).value)
    assert 0 < values[0] < values[1] < values[2]
