"""Statistics, their cache, the distance between them, and the command line."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from improved_diffusion.errors import UserError
from improved_diffusion.metrics import (
    FeatureExtractor,
    FeatureStatistics,
    compute_statistics,
    fid,
    metric_name,
    reference_statistics,
)
from improved_diffusion.metrics.extractor import FeatureSettings
from improved_diffusion.metrics.sources import ArraySource
from improved_diffusion.metrics.statistics import is_statistics_file

ROOT = Path(__file__).parents[2]
NOT_ENOUGH = "ignore:.*biased upwards"


def statistics(d: int = 4, n: int | None = 100, **settings: str) -> FeatureStatistics:
    chosen = {"preprocessing": "as usual", "weights_hash": "abc", **settings}
    return FeatureStatistics(
        name="some set",
        mean=torch.arange(d, dtype=torch.float64),
        cov=torch.eye(d, dtype=torch.float64),
        n=n,
        settings=FeatureSettings(features=d, **chosen),
    )


def test_statistics_equal_numpys_over_all_features(extractor64, photos):
    computed = compute_statistics(ArraySource("photos", photos), extractor64, batch_size=5)[64]
    features = extractor64(photos)[64].double().numpy()
    assert computed.n == 12
    np.testing.assert_allclose(computed.mean, features.mean(axis=0), rtol=1e-5)
    np.testing.assert_allclose(computed.cov, np.cov(features.T), rtol=1e-4, atol=1e-7)


def test_several_sizes_in_one_pass(extractor, extractor64, photos):
    source = ArraySource("photos", photos[:3])
    together = compute_statistics(source, extractor)
    assert {size: s.features for size, s in together.items()} == {64: 64, 192: 192, 768: 768, 2048: 2048}
    torch.testing.assert_close(together[64].cov, compute_statistics(source, extractor64)[64].cov, rtol=1e-4, atol=1e-8)


def test_features_that_are_not_finite_name_the_set(weights, photos):
    broken = FeatureExtractor((64,), weights=weights)
    broken.network.Conv2d_1a_3x3.bias[0] = float("nan")
    with pytest.raises(UserError, match=r"photos: .* NaN"):
        compute_statistics(ArraySource("photos", photos), broken)


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


class Unusable:
    """An extractor that has settings but may not be called: what it does not compute must come from the cache."""

    def __init__(self, extractor, weights_hash: str | None = None):
        self.features, self.batch_size, self.device = extractor.features, extractor.batch_size, extractor.device
        self._settings = extractor.settings
        self._changes = {"weights_hash": weights_hash} if weights_hash else {}

    def settings(self, size: int) -> FeatureSettings:
        return dataclasses.replace(self._settings(size), **self._changes)

    def __call__(self, images: np.ndarray) -> None:
        raise AssertionError("the network ran")


def test_reference_statistics_are_cached_by_content_and_settings(extractor64, photos, cache):
    first = reference_statistics(ArraySource("photos", photos), extractor64)[64]
    assert len(list((cache / "statistics").iterdir())) == 1
    again = reference_statistics(ArraySource("the same elsewhere", photos.copy()), Unusable(extractor64))[64]
    assert torch.equal(again.cov, first.cov)
    assert (again.name, again.n, again.settings) == ("the same elsewhere", first.n, first.settings)
    with pytest.raises(AssertionError, match="the network ran"):
        reference_statistics(ArraySource("photos", photos[1:]), Unusable(extractor64))
    with pytest.raises(AssertionError, match="the network ran"):
        reference_statistics(ArraySource("photos", photos), Unusable(extractor64, weights_hash="others"))


def test_a_damaged_cache_is_written_anew(extractor64, photos, cache):
    source = ArraySource("photos", photos)
    first = reference_statistics(source, extractor64)[64]
    (file,) = (cache / "statistics").iterdir()
    file.write_bytes(file.read_bytes()[:1000])
    assert torch.equal(reference_statistics(source, extractor64)[64].cov, first.cov)
    assert torch.equal(reference_statistics(source, Unusable(extractor64))[64].cov, first.cov)


def test_a_cache_that_cannot_be_written_costs_only_a_warning(extractor64, photos, cache):
    cache.write_text("a file where the directory should be")
    with pytest.warns(UserWarning, match="not cached"):
        assert reference_statistics(ArraySource("photos", photos), extractor64)[64].n == 12


@pytest.mark.parametrize(("features", "name"), [(64, "FID64"), (192, "FID192"), (768, "FID768"), (2048, "FID")])
def test_only_2048_features_are_called_fid(features, name):
    assert metric_name(features) == name


def test_fid_of_known_statistics():
    moved = dataclasses.replace(statistics(), mean=statistics().mean + 2, cov=9 * statistics().cov, n=50)
    result = fid(statistics(), moved)
    assert result.value == pytest.approx(4 * 4 + 4 * (3 - 1) ** 2)
    assert (result.metric, result.features, result.n_real, result.n_fake) == ("FID4", 4, 100, 50)
    assert result.weights_hash == "abc"


def test_statistics_that_cannot_be_compared_name_the_difference():
    with pytest.raises(UserError, match="4 features .* of 5"):
        fid(statistics(4), statistics(5))
    with pytest.raises(UserError, match="weights_hash: 'abc' and 'other'"):
        fid(statistics(), statistics(weights_hash="other"))
    with pytest.warns(UserWarning, match="does not say"):
        fid(statistics(), dataclasses.replace(statistics(), settings=None))


def test_fewer_images_than_features_is_a_warning():
    with pytest.warns(UserWarning, match="3 images for 4 features"):
        fid(statistics(), statistics(n=3))


@pytest.mark.filterwarnings(NOT_ENOUGH)
def test_fid_orders_degradations(extractor64, photos):
    sharp = compute_statistics(ArraySource("sharp", photos), extractor64)[64]
    values = []
    for radius in (1, 2, 4):
        coarse = [np.asarray(Image.fromarray(p).reduce(2 * radius).resize((64, 64))) for p in photos]
        values.append(fid(sharp, compute_statistics(ArraySource("coarse", np.stack(coarse)), extractor64)[64]).value)
    assert 0 < values[0] < values[1] < values[2]
    assert fid(sharp, sharp).value < 1e-9


# ----------------------------------------------------------------------------------------------------------------------
# Command line


def run_fid(*arguments: object) -> subprocess.CompletedProcess:
    command = [sys.executable, "fid.py", *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, env=os.environ, capture_output=True, text=True, timeout=120)


def test_the_command_line_measures_a_zip_against_an_array(tmp_path, weights, photos, cache):
    with zipfile.ZipFile(tmp_path / "real.zip", "w") as archive:
        for i, photo in enumerate(photos):
            with archive.open(f"class/{i}.png", "w") as file:
                Image.fromarray(photo).save(file, "png")
    np.savez(tmp_path / "fake.npz", photos[:, ::-1])
    report = tmp_path / "report.json"
    arguments = ("--features", 64, "--weights", weights, "--json", report)
    done = run_fid(tmp_path / "real.zip", tmp_path / "fake.npz", *arguments)
    assert done.returncode == 0, done.stderr
    result = json.loads(report.read_text())
    assert {k: result[k] for k in ("metric", "features", "n_real", "n_fake")} == {
        "metric": "FID64",
        "features": 64,
        "n_real": 12,
        "n_fake": 12,
    }
    assert done.stdout.startswith(f"FID64 {result['value']:.4f} ")
    assert "warning: " in done.stderr
    assert "12 images for 64 features" in done.stderr
    (cached,) = (cache / "statistics").iterdir()  # is itself a REAL that can be given
    again = run_fid(cached, tmp_path / "fake.npz", *arguments)
    assert again.returncode == 0, again.stderr
    assert json.loads(report.read_text())["value"] == result["value"]


def test_wrong_command_lines_are_one_line_and_exit_2(tmp_path, photos):
    np.save(tmp_path / "images.npy", photos)
    (tmp_path / "weights.pth").write_bytes(b"no weights")
    images = tmp_path / "images.npy"
    cases = [
        ((tmp_path / "missing", images), "nothing at"),
        ((images, images, "--weights", tmp_path / "weights.pth"), "fail their hash"),
        ((images, images, "--features", 65), "2048"),
    ]
    for arguments, message in cases:
        done = run_fid(*arguments)
        assert done.returncode == 2
        assert done.stderr.startswith("error: ")
        assert done.stderr.count("\n") == 1
        assert message in done.stderr
