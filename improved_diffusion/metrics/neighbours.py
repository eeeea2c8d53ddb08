"""What nearest neighbours in feature space tell: precision and recall, density and coverage, memorisation."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from improved_diffusion.errors import UserError
from improved_diffusion.metrics.estimate import Estimate, Influence
from improved_diffusion.metrics.features import Features

BLOCK = 2048  # rows and columns of a block of distances
SAME = 1e-3  # distances below this part of the features' own norm are rounding: the square root of float32's
Device = torch.device | str


def precision_recall(real: Features, fake: Features, k: int = 3, device: Device = "cpu") -> dict[str, Estimate]:
    """Improved precision and recall (Kynkäänniemi et al. 2019, arXiv:1904.06991).

    precision   the share of fake images within the manifold of the real ones
    recall      the share of real images within the manifold of the fake ones

    A set's manifold is the union of the balls about its images that reach to each one's k-th nearest neighbour.
    """
    _check(real, fake, k)
    radius_real, radius_fake = (neighbour_distances(side, k, device) for side in (real, fake))
    inside_real = _balls_around(fake, real, radius_real, device) > 0
    inside_fake = _balls_around(real, fake, radius_fake, device) > 0
    return {"precision": _mean(inside_real, fake, 1), "recall": _mean(inside_fake, real, 1)}


def density_coverage(real: Features, fake: Features, k: int = 5, device: Device = "cpu") -> dict[str, Estimate]:
    """Density and coverage (Naeem et al. 2020, arXiv:2002.09797), which outliers among the real images move less.

    density     how many of the real images' balls a fake image lies in, divided by k; about 1 for equal sets, unbounded
    coverage    the share of real images with a fake one in their ball
    """
    _check(real, fake, k)
    radius = neighbour_distances(real, k, device)
    nearest_fake, _ = nearest(real, fake, device)
    density = _balls_around(fake, real, radius, device) / k
    return {"density": _mean(density, fake, np.inf), "coverage": _mean(nearest_fake <= radius, real, 1)}


def memorisation(train: Features, real: Features, fake: Features, device: Device = "cpu") -> Estimate:
    """The share of generated images that are closer to a training image than that image is to any other one.

    This is 1 - authenticity (Alaa et al. 2022, arXiv:2102.08921). Images that were held out, `real`, give the share
    that owes nothing to memory: `held_out` in `details`, with `near_copies`, the share of fake images closer than the
    closest 1 % of training images are to each other, and `closest`, rows of (fake image, training image, distance over
    that of the training image to its own neighbour), the most suspicious first, by their numbers in their sources.
    """
    own = neighbour_distances(train, 1, device, distinct=True)
    ratios, partners, copies = _ratios(train, fake, own, device)
    held_out, _, _ = _ratios(train, real, own, device)
    order = np.argsort(ratios, kind="stable")[:64]
    return dataclasses.replace(
        _mean(ratios < 1, fake, 1),
        details={
            "n_train": train.n,
            "held_out": float((held_out < 1).mean()),
            "near_copies": float(copies.mean()),
            "closest": [
                (fake.image_index(row), train.image_index(int(partners[row])), float(ratios[row])) for row in order
            ],
        },
    )


def _ratios(
    train: Features, images: Features, own: np.ndarray, device: Device
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Of each image: its distance to the nearest training image over that one's `own`, its row, and whether it is
    nearer than 1 % of training images are to each other."""
    distances, partners = nearest(images, train, device)
    return distances / own[partners], partners, distances < np.quantile(own, 0.01)


def neighbour_distances(features: Features, k: int, device: Device = "cpu", distinct: bool = False) -> np.ndarray:
    """float32 (n,): the distance of each image to its k-th nearest other one in the set; if `distinct`, without those
    that are the same image once more."""
    origin, best = _origin(features, device), []
    for first, x in _blocks(features, origin):
        found = torch.empty(len(x), 0, device=device)
        for start, y in _blocks(features, origin):
            distances = _distances(x, y)
            if start == first:
                distances.fill_diagonal_(float("inf"))
            if distinct:
                distances[distances == 0] = float("inf")
            candidates = torch.cat([found, distances], dim=1)
            found = candidates.topk(min(k, candidates.shape[1]), dim=1, largest=False).values
        best.append(found[:, k - 1])
    return torch.cat(best).cpu().numpy()


def nearest(queries: Features, targets: Features, device: Device = "cpu") -> tuple[np.ndarray, np.ndarray]:
    """The distance of each query to the nearest target, float32 (n,), and that target's row."""
    origin, distances, rows = _origin(targets, device), [], []
    for _, x in _blocks(queries, origin):
        best = torch.full((len(x),), float("inf"), device=device)
        row = torch.zeros(len(x), dtype=torch.long, device=device)
        for start, y in _blocks(targets, origin):
            distance, index = _distances(x, y).min(dim=1)
            row = torch.where(distance < best, index + start, row)
            best = torch.minimum(distance, best)
        distances.append(best)
        rows.append(row)
    return torch.cat(distances).cpu().numpy(), torch.cat(rows).cpu().numpy()


def _balls_around(queries: Features, centres: Features, radius: np.ndarray, device: Device) -> np.ndarray:
    """int64 (n,): in how many of the balls of `radius` about `centres` each query lies."""
    origin, counts = _origin(centres, device), []
    for _, x in _blocks(queries, origin):
        count = torch.zeros(len(x), dtype=torch.long, device=device)
        for start, y in _blocks(centres, origin):
            reach = torch.from_numpy(radius[start : start + len(y)]).to(device)
            count += (_distances(x, y) <= reach).sum(dim=1)
        counts.append(count)
    return torch.cat(counts).cpu().numpy()


def _blocks(features: Features, origin: Tensor) -> Iterator[tuple[int, Tensor]]:
    """The first row of each block, and its features less `origin`."""
    for start in range(0, features.n, BLOCK):
        rows = np.array(features.array[start : start + BLOCK])
        yield start, torch.from_numpy(rows).to(origin.device) - origin


def _origin(features: Features, device: Device) -> Tensor:
    """About the mean. |x|^2 + |y|^2 - 2 x.y, which is the fast way to distances, loses the digits that a common offset
    takes up, so all features are taken from here."""
    return torch.from_numpy(np.array(features.array[:BLOCK])).to(device).mean(dim=0)


def _distances(x: Tensor, y: Tensor) -> Tensor:
    """Euclidean, (N, d) and (M, d) to (N, M); 0 where rounding cannot tell two images apart."""
    distances = torch.cdist(x, y, compute_mode="use_mm_for_euclid_dist")
    return distances.masked_fill_(distances < SAME * x.norm(dim=1, keepdim=True), 0)


def _mean(values: np.ndarray, of: Features, most: float) -> Estimate:
    values = values.astype(np.float64)
    return Estimate(float(values.mean()), (Influence(values, of.labels),), least=0, most=most)


def _check(real: Features, fake: Features, k: int) -> None:
    if min(real.n, fake.n) <= k:
        raise UserError(
            f"{k} neighbours need more than {k} images of each set, and the smaller has {min(real.n, fake.n)}"
        )
