"""Mean and covariance of the features of a set of images, with what they were made with."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import warnings
import zipfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from improved_diffusion.cache import cache_directory
from improved_diffusion.errors import UserError
from improved_diffusion.files import atomic_write
from improved_diffusion.metrics.features import Features
from improved_diffusion.metrics.frechet import factor
from improved_diffusion.metrics.images.opening import ARRAY_KEYS
from improved_diffusion.metrics.images.sources import Source
from improved_diffusion.metrics.inception.extractor import FeatureExtractor, FeatureSettings
from improved_diffusion.metrics.moments import Moments
from improved_diffusion.metrics.store import extract_features


@dataclass(frozen=True, eq=False)
class FeatureStatistics:
    """What the Fréchet distance needs to know of a set of images.

    `n` and `settings` are None where the statistics come from a program that did not save them.
    """

    name: str  # of the image set, for messages
    mean: Tensor  # float64 (d,)
    cov: Tensor  # float64 (d, d), unbiased
    n: int | None
    settings: FeatureSettings | None
    centred: Tensor | None = None  # float64 (n, d), features less their mean, where n <= d: an exact factor

    @property
    def features(self) -> int:
        """d, the feature size."""
        return len(self.mean)

    @functools.cached_property
    def factor(self) -> Tensor:
        """(d, rank) A with A A^T = cov."""
        if self.centred is not None:
            return self.centred.T / (len(self.centred) - 1) ** 0.5
        return factor(self.cov)

    def save(self, path: Path | str) -> None:
        """Write an .npz with `mu` and `sigma`, the names that FID programs share, and with `n` and `settings`."""
        arrays = {"mu": self.mean.numpy(), "sigma": self.cov.numpy()}
        if self.n is not None:
            arrays["n"] = np.int64(self.n)
        if self.settings is not None:
            arrays["settings"] = np.str_(json.dumps(dataclasses.asdict(self.settings)))
        with atomic_write(path) as temporary, temporary.open("wb") as file:
            np.savez(file, **arrays)

    @classmethod
    def load(cls, path: Path | str) -> FeatureStatistics:
        """Read what `save`, or another FID program, wrote.

        Raises:
            UserError: a damaged file, or arrays that are no mean and covariance.
        """
        try:
            with np.load(path, allow_pickle=False) as arrays:
                mean, cov = (torch.from_numpy(arrays[key].astype(np.float64)) for key in ("mu", "sigma"))
                n = int(arrays["n"]) if "n" in arrays else None
                settings = FeatureSettings(**json.loads(str(arrays["settings"]))) if "settings" in arrays else None
        except Exception as error:  # numpy, zipfile and zlib raise almost anything on a damaged file
            raise UserError(f"cannot read the statistics {path}: {' '.join(str(error).split())}") from error
        if mean.ndim != 1 or cov.shape != (len(mean), len(mean)):
            raise UserError(f"{path}: mu {tuple(mean.shape)} and sigma {tuple(cov.shape)} are no mean and covariance")
        if not (torch.isfinite(mean).all() and torch.isfinite(cov).all()):
            raise UserError(f"{path}: mu or sigma holds a NaN or an infinity")
        return cls(str(path), mean, cov, n, settings)


def statistics_of(features: Features) -> FeatureStatistics:
    """The statistics of features at hand.

    Raises:
        UserError: fewer than two images.
    """
    if features.n < 2:
        raise UserError(f"{features.name} has {features.n} image: at least 2 are needed to measure their statistics")
    moments = Moments(features.d)
    for block in features.blocks():
        moments.update(block)
    small = features.n <= features.d
    centred = torch.from_numpy(np.array(features.array, dtype=np.float64)) - moments.mean if small else None
    return FeatureStatistics(features.name, moments.mean, moments.covariance(), moments.n, features.settings, centred)


def cached_statistics(features: Features) -> FeatureStatistics:
    """`statistics_of`, kept in the cache directory under the content of the images and every setting."""
    if features.content_hash is None or features.n <= features.d:  # a few samples are faster than their covariance
        return statistics_of(features)
    file = _cache_file(features.content_hash, features.settings)
    if file.is_file():
        try:
            return dataclasses.replace(FeatureStatistics.load(file), name=features.name)
        except UserError:  # a damaged cache is no one's fault: write it anew
            pass
    statistics = statistics_of(features)
    try:
        statistics.save(file)
    except UserError as error:  # a full or read-only disk: what was measured is measured all the same
        warnings.warn(f"the statistics of {features.name} are not cached: {error}", stacklevel=2)
    return statistics


def reference_statistics(source: Source, extractor: FeatureExtractor) -> dict[int, FeatureStatistics]:
    """{feature size: statistics} of all images of `source`, from the cache as far as they are there.

    Raises:
        UserError: see `extract_features`.
    """
    files = {size: _cache_file(source.content_hash, extractor.settings(size)) for size in extractor.features}
    try:
        return {
            size: dataclasses.replace(FeatureStatistics.load(file), name=source.name) for size, file in files.items()
        }
    except UserError:
        return {size: cached_statistics(features) for size, features in extract_features(source, extractor).items()}


def _cache_file(content_hash: str, settings: FeatureSettings) -> Path:
    key = json.dumps({"content": content_hash, **dataclasses.asdict(settings)}, sort_keys=True)
    return cache_directory() / "statistics" / f"{hashlib.sha256(key.encode()).hexdigest()[:32]}.npz"


def is_statistics_file(path: Path | str) -> bool:
    """Whether `path` is an .npz of saved statistics. One that holds the images as well counts as images."""
    path = Path(path)
    if path.suffix.lower() != ".npz" or not zipfile.is_zipfile(path):
        return False
    try:
        with zipfile.ZipFile(path) as archive:
            keys = {Path(name).stem for name in archive.namelist()}
    except zipfile.BadZipFile:  # as images it is refused in one line
        return False
    return {"mu", "sigma"} <= keys and not keys & set(ARRAY_KEYS)
