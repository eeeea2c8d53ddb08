"""What nearest neighbours in feature space tell: precision and recall, density and coverage, memorisation."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import NamedTuple

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
    of_fake = _inside(fake, real, neighbour_distances(real, k, device), device)
    of_real = _inside(real, fake, neighbour_distances(fake, k, device), device)
    return {"precision": _covered(of_fake, fake, real), "recall": _covered(of_real, real, fake)}


def density_coverage(real: Features, fake: Features, k: int = 5, device: Device = "cpu") -> dict[str, Estimate]:
    """Density and coverage (Naeem et al. 2020, arXiv:2002.09797), which outliers among the real images move less.

    density     how many of the real images' balls a fake image lies in, divided by k; about 1 for equal sets, unbounded
    coverage    the share of real images with a fake one in their ball
    """
    _check(real, fake, k)
    of_fake, of_ball = _inside(fake, real, neighbour_distances(real, k, device), device, both=True)
    density = Estimate(
        value=float(of_fake.counts.mean() / k),
        influences=(
            Influence(of_fake.counts / k, fake.labels),
            Influence(of_ball.counts * real.n / (fake.n * k), real.labels),
        ),
        least=0,
    )
    return {"density": density, "coverage": _covered(of_ball, real, fake)}


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


class _Inside(NamedTuple):
    """Of each of n images, float64: how many of the others it meets (`counts`), and the sum of their rows, which is the
    row of the only one where it meets one."""

    counts: np.ndarray
    rows: np.ndarray


def _inside(
    queries: Features, centres: Features, radius: np.ndarray, device: Device, both: bool = False
) -> _Inside | tuple[_Inside, _Inside]:
    """Which of the balls of `radius` about `centres` each query lies in; if `both`, also what lies in each ball."""
    origin = _origin(centres, device)
    of_query, of_ball = (torch.zeros(2, n, dtype=torch.float64, device=device) for n in (queries.n, centres.n))
    for first, x in _blocks(queries, origin):
        x_rows = torch.arange(first, first + len(x), device=device)
        for start, y in _blocks(centres, origin):
            y_rows = torch.arange(start, start + len(y), device=device)
            reach = torch.from_numpy(radius[start : start + len(y)]).to(device)
            inside = (_distances(x, y) <= reach).double()
            of_query[:, x_rows] += torch.stack([inside.sum(1), inside @ y_rows.double()])
            of_ball[:, y_rows] += torch.stack([inside.sum(0), x_rows.double() @ inside])
    found = _Inside(*of_query.cpu().numpy()), _Inside(*of_ball.cpu().numpy())
    return found if both else found[0]


def _covered(inside: _Inside, images: Features, others: Features) -> Estimate:
    """The share of `images` that meet one of `others`. One of these is worth, by a jackknife, the images that meet no
    other."""
    covered = inside.counts > 0
    sole = np.bincount(inside.rows[inside.counts == 1].astype(np.int64), minlength=others.n)
    return dataclasses.replace(
        _mean(covered, images, 1),
        influences=(
            Influence(covered.astype(np.float64), images.labels),
            Influence(sole * others.n / images.n, others.labels),
        ),
    )


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
