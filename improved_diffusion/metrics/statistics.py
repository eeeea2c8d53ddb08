"""The mean and covariance of a set's features: computed, saved, and cached for sets that are measured against often."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import warnings
import zipfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from improved_diffusion.errors import UserError
from improved_diffusion.files import atomic_write
from improved_diffusion.metrics.cache import cache_directory
from improved_diffusion.metrics.extractor import FeatureExtractor, FeatureSettings
from improved_diffusion.metrics.moments import Moments
from improved_diffusion.metrics.sources import ARRAY_KEYS, Source, StoredSource
from improved_diffusion.progress import progress


@dataclass(frozen=True, eq=False)
class FeatureStatistics:
    """First and second moments of the features of `n` images.

    `n` and `settings` are None where the statistics come from a program that did not save them.
    """

    name: str  # of the image set, for messages
    mean: Tensor  # float64 (d,)
    cov: Tensor  # float64 (d, d), unbiased
    n: int | None
    settings: FeatureSettings | None

    @property
    def features(self) -> int:
        """d, the feature size."""
        return len(self.mean)

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
        except (OSError, ValueError, KeyError, TypeError, EOFError, zipfile.BadZipFile) as error:
            raise UserError(f"cannot read the statistics {path}: {error}") from error
        if mean.ndim != 1 or cov.shape != (len(mean), len(mean)):
            raise UserError(f"{path}: mu {tuple(mean.shape)} and sigma {tuple(cov.shape)} are no mean and covariance")
        if not (torch.isfinite(mean).all() and torch.isfinite(cov).all()):
            raise UserError(f"{path}: mu or sigma holds a NaN or an infinity")
        return cls(str(path), mean, cov, n, settings)


def compute_statistics(
    source: Source, extractor: FeatureExtractor, batch_size: int | None = None
) -> dict[int, FeatureStatistics]:
    """Extract the features of all the images, in one pass, and return {feature size: statistics}.

    Memory does not grow with the number of images.

    Raises:
        UserError: features that are not finite, or images that cannot be decoded.
    """
    device = extractor.device if extractor.device.type == "cuda" else "cpu"  # not every accelerator has float64
    moments = {size: Moments(size, device) for size in extractor.features}
    with progress(total=len(source), desc=f"features of {source.name}", unit="image") as bar:
        for images in source.batches(batch_size or extractor.batch_size):
            for size, features in extractor(images).items():
                try:
                    moments[size].update(features)
                except FloatingPointError as error:
                    raise UserError(f"{source.name}: {error}, after image {bar.n:,}") from error
            bar.update(len(images))
    return {
        size: FeatureStatistics(source.name, m.mean.cpu(), m.covariance().cpu(), m.n, extractor.settings(size))
        for size, m in moments.items()
    }


def reference_statistics(
    source: StoredSource, extractor: FeatureExtractor, batch_size: int | None = None
) -> dict[int, FeatureStatistics]:
    """`compute_statistics`, kept in the cache directory under the set's content and every setting of the features."""
    files = {size: _cache_file(source, extractor.settings(size)) for size in extractor.features}
    if all(file.is_file() for file in files.values()):
        try:
            return {
                size: dataclasses.replace(FeatureStatistics.load(file), name=source.name)
                for size, file in files.items()
            }
        except UserError:  # a damaged cache is no one's fault: write it anew
            pass
    statistics = compute_statistics(source, extractor, batch_size)
    try:
        for size, file in files.items():
            statistics[size].save(file)
    except UserError as error:  # a full or read-only disk: what was measured is measured all the same
        warnings.warn(f"the statistics of {source.name} are not cached: {error}", stacklevel=2)
    return statistics


def _cache_file(source: StoredSource, settings: FeatureSettings) -> Path:
    key = json.dumps({"content": source.content_hash, **dataclasses.asdict(settings)}, sort_keys=True)
    name = f"{hashlib.sha256(key.encode()).hexdigest()[:32]}.npz"
    return cache_directory() / "statistics" / name


def is_statistics_file(path: Path | str) -> bool:
    """Whether `path` is an .npz of saved statistics. One that holds the images as well counts as images."""
    path = Path(path)
    if path.suffix.lower() != ".npz" or not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as archive:
        keys = {Path(name).stem for name in archive.namelist()}
    return {"mu", "sigma"} <= keys and not keys & set(ARRAY_KEYS)
