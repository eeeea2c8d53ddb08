"""Measuring sets of images: Inception features, the distances between them, and how certain each number is."""

from improved_diffusion.metrics.features import Features, features_of_batches
from improved_diffusion.metrics.fid import frechet_inception_distance, metric_name
from improved_diffusion.metrics.frechet import frechet_distance
from improved_diffusion.metrics.images.opening import open_source
from improved_diffusion.metrics.inception.extractor import FeatureExtractor
from improved_diffusion.metrics.measure import METRICS, FeatureSets, Measurement, measure
from improved_diffusion.metrics.moments import Moments
from improved_diffusion.metrics.statistics import FeatureStatistics, reference_statistics
from improved_diffusion.metrics.store import extract_features

__all__ = [
    "METRICS",
    "FeatureExtractor",
    "FeatureStatistics",
    "Features",
    "FeatureSets",
    "Measurement",
    "Moments",
    "extract_features",
    "features_of_batches",
    "frechet_distance",
    "frechet_inception_distance",
    "measure",
    "metric_name",
    "open_source",
    "reference_statistics",
]
