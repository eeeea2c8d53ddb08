"""Measurements as records, and the command line `fid.py`."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import importlib.metadata
import json
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import fid as command
from improved_diffusion.errors import UserError
from improved_diffusion.metrics import METRICS, FeatureSets, measure
from improved_diffusion.metrics.images.opening import open_source
from improved_diffusion.metrics.images.sources import balanced_rows, proportional_rows
from improved_diffusion.metrics.measure import feature_sizes
from improved_diffusion.metrics.report import table
from improved_diffusion.metrics.statistics import statistics_of

LABELLED = [name for name in METRICS if name not in ("sfid", "inception-score", "per-class", "class-accuracy")]


@pytest.fixture
def sets(two_sets) -> FeatureSets:
    real, fake = two_sets
    return FeatureSets({32: real}, {32: fake}, {32: real})


def test_every_number_says_what_it_was_measured_with(sets):
    results = {result.metric: result for result in measure(sets, LABELLED, 32)}
    assert set(results) == {
        *("FID32", "FID32-infinity", "KID32", "precision", "recall", "density", "coverage", "FID32 floor"),
        "memorisation",
    }
    for result in results.values():
        assert result.low <= result.value <= result.high
        assert (result.features, result.n_real, result.n_fake) == (32, 300, 240)
        assert (result.preprocessing, result.precision, result.weights_hash) == ("tf1", "float32", "abc")
    assert results["FID32 floor"].value < results["FID32"].value
    assert json.loads(json.dumps(results["FID32-infinity"].as_dict()))["details"]["bias"] > 0


def test_the_order_of_the_images_does_not_matter(sets):
    rng = np.random.default_rng(0)
    shuffled = FeatureSets(
        *({32: side[32].take(rng.permutation(side[32].n))} for side in (sets.real, sets.fake, sets.train))
    )
    # Not of those that draw a part of the images, by their place.
    names = [name for name in LABELLED if name not in ("fid-infinity", "floor")]
    for one, other in zip(measure(sets, names, 32), measure(shuffled, names, 32), strict=True):
        assert other.value == pytest.approx(one.value, rel=1e-6), one.metric


def test_too_few_images_are_noted(sets):
    few = FeatureSets({32: sets.real[32].take(np.arange(20))}, sets.fake)
    (result,) = measure(few, ["fid"], 32)
    assert "20 images for 32 features" in result.notes[0]
    assert "biased upwards" in table([result])
    with pytest.raises(UserError, match="at least 80 images"):
        measure(few, ["fid-infinity"], 32)


def test_saved_statistics_serve_fid_alone(sets):
    saved = FeatureSets({32: statistics_of(sets.real[32])}, sets.fake)
    (result,) = measure(saved, ["fid"], 32)
    assert "as fixed" in result.notes[0]
    for metric in ("kid", "precision-recall", "per-class", "fid-infinity"):
        with pytest.raises(UserError, match="needs the images themselves"):
            measure(
                FeatureSets({32: saved.real[32], 64: saved.real[32]}, {32: sets.fake[32], 64: sets.fake[32]}),
                [metric],
                32,
            )


def test_what_is_missing_or_does_not_fit_is_said(sets, make_features):
    other = make_features(sets.fake[32].array, weights_hash="other")
    for metric in ("fid", "kid", "precision-recall", "density-coverage"):
        with pytest.raises(UserError, match="weights_hash: 'abc' and 'other'"):
            measure(FeatureSets(sets.real, {32: other}), [metric], 32)
    with pytest.raises(UserError, match="weights_hash"):
        measure(FeatureSets(sets.real, sets.fake, {32: other}), ["memorisation"], 32)
    with pytest.raises(UserError, match="features of size 64 of the real images"):
        measure(sets, ["fid"], 64)
    with pytest.raises(UserError, match="no metric 'fdi'"):
        measure(sets, ["fdi"], 32)
    with pytest.raises(UserError, match="--train"):
        measure(FeatureSets(sets.real, sets.fake), ["memorisation"], 32)


def test_sizes_of_features():
    assert feature_sizes(["fid", "kid"], 2048) == {2048}
    assert feature_sizes(["fid", "per-class", "sfid", "inception-score"], 192) == {192, 64, 2023, 1008}


def test_the_floor_has_the_classes_in_the_proportion_of_the_fake_images(make_features):
    """What is drawn like the real images is not below it, however uneven these are."""
    rng = np.random.default_rng(0)

    def drawn(*counts: int):
        labels = np.repeat([0, 1], counts)
        return make_features(4.0 * np.eye(8)[labels] + rng.normal(size=(len(labels), 8)), labels, ("a", "b"))

    sets = FeatureSets({8: drawn(1800, 200)}, {8: drawn(1800, 200)}, {8: drawn(3000, 1000)})
    fid, floor = measure(sets, ["fid", "floor"], 8)
    assert floor.value == pytest.approx(fid.value, abs=0.1)
    assert floor.n_fake == 2000
    few = FeatureSets(sets.real, sets.fake, {8: drawn(3000, 100)})
    (floor,) = measure(few, ["floor"], 8)
    assert floor.n_fake == 1000
    assert "of 1,000 training images, all that there are of these classes" in floor.notes[0]


def test_memorisation_against_the_training_set_itself_is_noted(sets):
    same = dataclasses.replace(sets.real[32], content_hash="same")
    (result,) = measure(FeatureSets({32: same}, sets.fake, {32: same}), ["memorisation"], 32)
    assert any("REAL is the training set itself" in note for note in result.notes)


def test_a_part_in_proportion():
    labels = np.repeat([0, 1, 2], [50, 20, 30])
    rows = proportional_rows(labels, np.array([0.2, 0.0, 0.8]), 20, seed=0)
    assert np.bincount(labels[rows]).tolist() == [4, 0, 16]
    assert (np.diff(rows) > 0).all()
    assert np.bincount(labels[proportional_rows(labels, np.array([0.25, 0, 0.75]), 90, seed=0)]).tolist() == [10, 0, 30]


def test_a_subset_is_even_over_the_classes():
    labels = np.repeat([0, 1, 2], [50, 20, 30])
    rows = balanced_rows(100, labels, 30, seed=0)
    assert np.bincount(labels[rows]).tolist() == [10, 10, 10]
    assert (np.diff(rows) > 0).all()
    larger = balanced_rows(100, labels, 90, seed=0)
    assert np.bincount(labels[larger]).tolist() == [40, 20, 30]
    assert set(rows) < set(larger)
    assert balanced_rows(100, labels, 1000, seed=0).tolist() == list(range(100))
    assert len(balanced_rows(100, None, 7, seed=1)) == 7


# ----------------------------------------------------------------------------------------------------------------------
# Command line


@pytest.fixture
def run_fid(run_script, monkeypatch) -> Callable[..., Any]:
    """`fid.py` in this process: in one of its own it would take seconds to import torch."""
    monkeypatch.setattr(warnings, "formatwarning", warnings.formatwarning)  # which the command sets, for good
    return functools.partial(run_script, "fid.py")


def test_the_command_line_knows_every_metric():
    assert list(METRICS) == command.METRICS


@pytest.fixture
def folders(tmp_path, photos) -> tuple[Path, Path, Path]:
    """REAL and FAKE, a zip and a folder of 3 classes and 30 images, and an array of training images, those of FAKE."""
    images = np.concatenate([np.roll(photos, shift, axis=2) for shift in range(0, 25, 5)])
    with zipfile.ZipFile(tmp_path / "real.zip", "w") as archive:
        for i, image in enumerate(images[:30]):
            with archive.open(f"class{i % 3}/{i:03}.png", "w") as file:
                Image.fromarray(image).save(file, "png")
    for i, image in enumerate(images[30:]):
        file = tmp_path / "fake" / f"class{i % 3}" / f"{i:03}.webp"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image[::-1]).save(file, lossless=True)
    np.save(tmp_path / "train.npy", images[30:, ::-1])
    return tmp_path / "real.zip", tmp_path / "fake", tmp_path / "train.npy"


def test_the_command_line_measures_draws_and_writes(run_fid, tmp_path, weights, folders):
    real, fake, train = folders
    report, plot, pairs = tmp_path / "report.json", tmp_path / "plot.png", tmp_path / "pairs.png"
    statistics = tmp_path / "statistics.npz"
    arguments = ("--features", 64, "--weights", weights, "--json", report)
    done = run_fid(
        *(real, fake, *arguments, "--train", train, "--plot", plot, "--pairs", pairs, "--save-statistics", statistics),
        *("--metrics", "fid", "kid", "precision-recall", "per-class", "floor", "memorisation"),
    )
    assert done.code == 0, done.err
    result = json.loads(report.read_text())
    assert {k: result[k] for k in ("metric", "features", "n_real", "n_fake")} == {
        "metric": "FID64",
        "features": 64,
        "n_real": 30,
        "n_fake": 30,
    }
    names = [part["metric"] for part in result["measurements"]]
    assert names[:5] == ["FID64", "KID64", "precision", "recall", "FID64 of " + names[4].split()[-1]]
    for side, path in (("real", real), ("fake", fake), ("train", train)):
        source = open_source(path)
        assert result[side] == {"path": str(path), "content_hash": source.content_hash, "n": len(source)}
    assert result["improved_diffusion"]["version"] == importlib.metadata.version("improved_diffusion")
    assert len(result["improved_diffusion"]["commit"]) >= 7
    memory = result["measurements"][-1]
    assert (memory["metric"], memory["value"], memory["details"]["near_copies"]) == ("memorisation", 1.0, 1.0)
    assert f"{result['value']:.4f}" in done.out.splitlines()[1]
    assert "30 images for 64 features" in done.out
    assert "Traceback" not in done.err
    for picture in (plot, pairs):
        with Image.open(picture) as image:
            assert min(image.size) > 300
    again = run_fid(statistics, fake, *arguments)
    assert again.code == 0, again.err
    of_statistics = json.loads(report.read_text())
    assert of_statistics["value"] == pytest.approx(result["value"], rel=1e-6)
    digest = hashlib.sha256(statistics.read_bytes()).hexdigest()
    assert of_statistics["real"] == {"path": str(statistics), "content_hash": digest, "n": 30}
    subset = run_fid(real, fake, *arguments, "--n", 15, "--train", train, "--metrics", "fid", "memorisation")
    assert subset.code == 0, subset.err
    fid, memory = json.loads(report.read_text())["measurements"]
    assert (fid["n_fake"], memory["n_fake"], memory["details"]["n_train"]) == (15, 15, 30)
    assert memory["value"] == 1.0  # copies of training images, all of which were looked at
    refused = run_fid(real, fake, *arguments, "--metrics", "fid-infinity", "fid")
    assert refused.code == 2
    assert "FID64 " in refused.out  # what can be measured is
    assert "at least 160 images" in refused.err


def test_wrong_command_lines_are_one_line_and_exit_2(run_fid, tmp_path, photos, weights):
    images = tmp_path / "images.npy"
    np.save(images, photos)
    np.save(tmp_path / "dots.npy", np.zeros((5, 1, 1, 3), np.uint8))
    (tmp_path / "weights.pth").write_bytes(b"no weights")
    (tmp_path / "empty").mkdir()
    (tmp_path / "one").mkdir()
    Image.fromarray(photos[0]).save(tmp_path / "one" / "a.png")
    (tmp_path / "films").mkdir()
    for name in ("a.png", "b.png"):
        (tmp_path / "films" / name).write_bytes(b"\x00\x00\x00\x18ftypmp42")
    with zipfile.ZipFile(tmp_path / "texts.zip", "w") as archive:
        archive.writestr("a.txt", "text")
    np.savez(tmp_path / "statistics.npz", mu=np.zeros(192), sigma=np.eye(192))
    np.savez(tmp_path / "nan.npz", mu=np.full(64, np.nan), sigma=np.eye(64))
    np.savez(tmp_path / "labels.npz", arr_0=photos, labels=np.arange(12), class_names=["a", "b"])
    np.savez_compressed(tmp_path / "zlib.npz", arr_0=photos)
    content = bytearray((tmp_path / "zlib.npz").read_bytes())
    content[1000:1100] = bytes(100)
    (tmp_path / "zlib.npz").write_bytes(content)
    cases = [
        ((tmp_path / "missing", images), "nothing at"),
        ((images, images, "--weights", tmp_path / "weights.pth"), "fail their hash"),
        ((images, images, "--features", 65), "2048"),
        ((images, images, "--metrics", "fdi"), "precision-recall"),
        ((images, images, "--confidence", 95), "between 0 and 1"),
        ((images, images, "--n", 1), "--n is 1"),
        ((images, images, "--seed", -1), "--seed is -1"),
        ((images, images, "--metrics", "kid", "per-class", "--plot", tmp_path / "x.xyz"), ".png or .pdf or .svg"),
        ((images, images, "--save-statistics", tmp_path / "x"), ".npz"),
        ((tmp_path / "zlib.npz", images), "damaged"),
        ((tmp_path / "labels.npz", images), "labels from 0 to 11 and 2 class_names"),
        ((images, images, "--metrics", "memorisation", "--features", 64), "--train"),
        ((images, images, "--metrics", "inception-score", "--weights", weights), "last layer"),
        ((images, images, "--features", 64, "--plot", tmp_path / "x.png"), "--plot draws"),
        ((tmp_path / "empty", images), "no images"),
        ((tmp_path / "one", images), "1 image"),
        ((tmp_path / "texts.zip", images), "no images"),
        ((tmp_path / "films", images, "--features", 64), "a.png"),
        ((tmp_path / "dots.npy", images, "--features", 64), "1x1 pixels"),
        ((tmp_path / "statistics.npz", images, "--features", 64), "192 features"),
        ((tmp_path / "nan.npz", images, "--features", 64), "NaN"),
    ]
    for arguments, message in cases:
        done = run_fid(*arguments)
        assert done.code == 2, (arguments, done.err)
        lines = [line for line in done.err.splitlines() if line and not line.startswith(("features of", "warning: "))]
        assert len(lines) == 1, done.err
        assert lines[0].startswith("error: ")
        assert message in lines[0]
