"""Batches are a pure function of (seed, step): the same for any world size, and every epoch is a permutation."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from improved_diffusion.data import ImageSet
from improved_diffusion.data.batches import BatchStream
from improved_diffusion.errors import UserError

CPU = torch.device("cpu")


def make_set(count: int, size: int = 2) -> ImageSet:
    """The label is the row number, and the left half of the image is darker than the right."""
    rng = np.random.default_rng(count)
    images = rng.integers(0, 128, (count, size, size, 3), dtype=np.uint8)
    images[:, :, size // 2 :] += 128
    return ImageSet(images, np.arange(count), tuple(map(str, range(count))), Path("memory"), "all", "")


def is_flipped(x: torch.Tensor) -> torch.Tensor:
    return x[:, 0, 0, 0] > x[:, 0, 0, -1]


@settings(deadline=None, max_examples=60)
@given(
    count=st.integers(1, 50),
    share=st.integers(1, 20),
    world_size=st.integers(1, 5),
    step=st.integers(0, 10**9),
    seed=st.integers(0, 2**63),
)
def test_ranks_share_out_one_global_batch(count: int, share: int, world_size: int, step: int, seed: int):
    image_set = make_set(count)
    batch_size = share * world_size
    x, y = BatchStream(image_set, batch_size, seed, flip=True, device=CPU).batch(step)
    parts = [
        BatchStream(image_set, batch_size, seed, flip=True, device=CPU, rank=rank, world_size=world_size).batch(step)
        for rank in range(world_size)
    ]
    torch.testing.assert_close(x, torch.cat([part[0] for part in parts]), rtol=0, atol=0)
    torch.testing.assert_close(y, torch.cat([part[1] for part in parts]), rtol=0, atol=0)


@settings(deadline=None, max_examples=60)
@given(count=st.integers(1, 40), batch_size=st.integers(1, 100), epochs=st.integers(1, 4), seed=st.integers(0, 99))
def test_every_epoch_is_a_permutation(count: int, batch_size: int, epochs: int, seed: int):
    """Also where batches straddle epochs, or one batch is longer than an epoch."""
    stream = BatchStream(make_set(count), batch_size, seed, flip=False, device=CPU)
    steps = -(-count * epochs // batch_size)
    drawn = torch.cat([stream.batch(step)[1] for step in range(steps)])[: count * epochs]
    for epoch in drawn.reshape(epochs, count):
        assert sorted(epoch.tolist()) == list(range(count))


@settings(deadline=None, max_examples=60)
@given(count=st.integers(1, 30), batch_size=st.integers(1, 30), step=st.integers(0, 1000))
def test_position_in_the_run_decides_the_sample(count: int, batch_size: int, step: int):
    """Sample p is the same whatever batch it falls into, so the batch size cuts one sequence."""
    image_set = make_set(count)
    x, y = BatchStream(image_set, batch_size, 5, flip=True, device=CPU).batch(step)
    single = BatchStream(image_set, 1, 5, flip=True, device=CPU)
    for j in range(batch_size):
        x_one, y_one = single.batch(step * batch_size + j)
        assert torch.equal(x[j : j + 1], x_one)
        assert torch.equal(y[j : j + 1], y_one)


def test_pixels_and_labels():
    image_set = make_set(10, size=4)
    x, y = BatchStream(image_set, 10, 0, flip=False, device=CPU).batch(0)
    assert (x.shape, x.dtype, y.dtype) == ((10, 3, 4, 4), torch.float32, torch.int64)
    expected = image_set.images[y.numpy()].astype(np.float64).transpose(0, 3, 1, 2) / 127.5 - 1
    np.testing.assert_allclose(x.numpy(), expected, atol=1e-6)
    extremes = ImageSet(np.array([[[[0, 255, 51]]]], np.uint8), np.array([0]), ("a",), Path("memory"), "all", "")
    x, _ = BatchStream(extremes, 1, 0, flip=False, device=CPU).batch(0)
    assert x.flatten().tolist()[:2] == [-1.0, 1.0]


def test_flip_mirrors_half_of_the_images_anew_each_epoch():
    count = 2000
    image_set = make_set(count)
    flipped_stream = BatchStream(image_set, count, 1, flip=True, device=CPU)
    plain_stream = BatchStream(image_set, count, 1, flip=False, device=CPU)
    of_row = []
    for epoch in range(2):
        x, y = flipped_stream.batch(epoch)
        plain, y_plain = plain_stream.batch(epoch)
        flipped = is_flipped(x)
        assert torch.equal(y, y_plain)
        assert not is_flipped(plain).any()
        assert torch.equal(x, torch.where(flipped[:, None, None, None], plain.flip(3), plain))
        assert abs(flipped.float().mean() - 0.5) < 5 * 0.5 / count**0.5  # five standard deviations
        of_row.append(flipped[y.argsort()])
    assert 0.4 < (of_row[0] == of_row[1]).float().mean() < 0.6


def test_seed_and_epoch_change_the_order():
    image_set = make_set(100)
    orders = [
        tuple(BatchStream(image_set, 100, seed, flip=False, device=CPU).batch(step)[1].tolist())
        for seed in (0, 1)
        for step in (0, 1)
    ]
    assert len(set(orders)) == 4


def test_prefetched_batches_are_the_same_from_any_step():
    stream = BatchStream(make_set(37), 8, 2, flip=True, device=CPU)
    for first_step in (0, 11):
        for step, (x, y) in enumerate(itertools.islice(stream.batches(first_step), 15), start=first_step):
            x_alone, y_alone = stream.batch(step)
            assert torch.equal(x, x_alone)
            assert torch.equal(y, y_alone)


@pytest.mark.parametrize(("batch_size", "world_size"), [(10, 4), (0, 1), (3, 4)])
def test_batch_size_must_fit_the_processes(batch_size: int, world_size: int):
    with pytest.raises(UserError, match=f"{batch_size}, must be a positive multiple of the {world_size} processes"):
        BatchStream(make_set(5), batch_size, 0, flip=False, device=CPU, world_size=world_size)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("resident", [True, False])
def test_cuda_draws_what_the_cpu_draws(resident: bool, monkeypatch: pytest.MonkeyPatch):
    if not resident:
        monkeypatch.setattr("improved_diffusion.data.batches.RESIDENT_FRACTION", 0.0)
    image_set = make_set(37, size=8)
    cuda = BatchStream(image_set, 16, 2, flip=True, device=torch.device("cuda"))
    cpu = BatchStream(image_set, 16, 2, flip=True, device=CPU)
    for step, (x, y) in enumerate(itertools.islice(cuda.batches(0), 10)):
        x_cpu, y_cpu = cpu.batch(step)
        assert torch.equal(y.cpu(), y_cpu)
        torch.testing.assert_close(x.cpu(), x_cpu, rtol=0, atol=1e-6)
