"""How far a cut-out is from the truth."""

from __future__ import annotations

import math

import numpy as np
from scipy import ndimage

BOUNDARY_REACH = 0.008  # share of the picture's diagonal (Perazzi et al. 2016, DAVIS)
MEASURES = ("IoU", "boundary F", "MAE", "SAD")
THRESHOLD = 0.5  # alpha from which a pixel counts as the subject's


def measure(alpha: np.ndarray, truth: np.ndarray) -> dict[str, float]:
    """The MEASURES of an alpha (H, W) in [0, 1] against the true one: two of the masks that they make at THRESHOLD, the
    mean absolute error, and the sum of absolute errors in thousands (of pixels)."""
    mask, true_mask = alpha >= THRESHOLD, truth >= THRESHOLD
    difference = np.abs(alpha.astype(np.float64) - truth)
    return {
        "IoU": intersection_over_union(mask, true_mask),
        "boundary F": boundary_f(mask, true_mask),
        "MAE": float(difference.mean()),
        "SAD": float(difference.sum() / 1000),
    }


def intersection_over_union(mask: np.ndarray, truth: np.ndarray) -> float:
    """The Jaccard index of two masks, bool (H, W); 1 where both are empty."""
    union = np.count_nonzero(mask | truth)
    return np.count_nonzero(mask & truth) / union if union else 1.0


def boundary_f(mask: np.ndarray, truth: np.ndarray) -> float:
    """The F measure of the boundaries of two masks, bool (H, W): a pixel of one is found if there is one of the other
    within `BOUNDARY_REACH`, rounded up to pixels. 1 where neither has a boundary, 0 where one alone has."""
    boundary, true_boundary = _boundary(mask), _boundary(truth)
    if not boundary.any() or not true_boundary.any():
        return float(boundary.any() == true_boundary.any())
    reach = math.ceil(BOUNDARY_REACH * math.hypot(*mask.shape))
    precision = _share_near(boundary, true_boundary, reach)
    recall = _share_near(true_boundary, boundary, reach)
    return 2 * precision * recall / (precision + recall) if precision + recall else 0.0


def _boundary(mask: np.ndarray) -> np.ndarray:
    """The pixels of `mask` beside one that is not; the frame of the picture is no boundary."""
    return mask & ~ndimage.binary_erosion(mask, border_value=1)


def _share_near(pixels: np.ndarray, others: np.ndarray, reach: float) -> float:
    distance = ndimage.distance_transform_edt(~others)
    return float((distance[pixels] <= reach).mean())
