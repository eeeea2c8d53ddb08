"""Ratings of images by people: how certain a mean is, and how far the people agree.

Ratings are float64 (people, images), with NaN where one is missing.
"""

from __future__ import annotations

import numpy as np

from improved_diffusion.metrics.estimate import Estimate, Influence


def contrast(ratings: np.ndarray, items: np.ndarray, *sides: np.ndarray) -> Estimate | None:
    """The mean rating of some images or, of two sides, that of the first less that of the second; None where a side has
    no rating.

    The people are a sample, and so are the images: both have an influence, so that `bootstrap_interval` draws them
    independently and adds up the spread of the people's means and that of the images' means. It is the linear part of
    the pigeonhole bootstrap (Owen 2007, arXiv:0712.1111). What neither explains counts twice, which matters little once
    there are several of both. Of few people's spread no bootstrap knows much: 95 % intervals from five people hold the
    truth about 90 % of the time.

    Args:
        ratings: (people, images).
        items: int (images,), from 0: images with the same number are drawn together, those of one prompt for instance.
        sides: one or two, bool (images,).
    """
    value, pulls, rated = 0.0, np.zeros_like(ratings), np.zeros_like(ratings, bool)
    for sign, side in zip((1, -1), sides, strict=False):
        given = ~np.isnan(ratings) & side
        if not given.any():
            return None
        mean = ratings[given].mean()
        value += sign * mean
        pulls[given] = sign * (ratings[given] - mean) / given.sum()
        rated |= given
    of_people = pulls.sum(axis=1)[rated.any(axis=1)]
    of_items = np.bincount(items, pulls.sum(axis=0))[np.unique(items[rated.any(axis=0)])]
    return Estimate(float(value), tuple(Influence(len(pull) * pull) for pull in (of_people, of_items)))


def krippendorff_alpha(ratings: np.ndarray) -> float | None:
    """Agreement: 1 where all agree, about 0 where they answer at random, below 0 where they contradict each other.

    Krippendorff's alpha with the interval metric, (c - k)^2 (Krippendorff 2011, "Computing Krippendorff's
    Alpha-Reliability"). In this metric the pairs of values within an image sum up to its squares about its mean:

        alpha = 1 - (n - 1) / n * sum_u (m_u / (m_u - 1) * SS_u) / SS

    with the m_u values of image u and the n of all images, and SS, SS_u their squares about their mean. Images with
    fewer than two values do not count.

    Returns:
        alpha, or None where it is not defined: no image with two values, or all values alike.
    """
    ratings = ratings[:, (~np.isnan(ratings)).sum(axis=0) >= 2]
    counts = (~np.isnan(ratings)).sum(axis=0)
    n = counts.sum()
    if n == 0 or np.nanmax(ratings) == np.nanmin(ratings):
        return None
    within = np.nansum((ratings - np.nanmean(ratings, axis=0)) ** 2, axis=0)
    among = np.nansum((ratings - np.nanmean(ratings)) ** 2)
    return float(1 - (n - 1) / n * (counts / (counts - 1) * within).sum() / among)
