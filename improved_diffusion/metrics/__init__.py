"""Measuring sets of images: Inception features and the Fréchet distance between them."""

from improved_diffusion.metrics.extractor import FeatureExtractor
from improved_diffusion.metrics.fid import FID, fid, metric_name
from improved_diffusion.metrics.frechet import frechet_distance
from improved_diffusion.metrics.moments import Moments
from improved_diffusion.metrics.statistics import FeatureStatistics, compute_statistics, reference_statistics

__all__ = [
    "FID",
    "FeatureExtractor",
    "FeatureStatistics",
    "Moments",
    "compute_statistics",
    "fid",
    "frechet_distance",
    "metric_name",
    "reference_statistics",
]
