"""What a stream shows, counted by hand."""

from __future__ import annotations

from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from improved_diffusion.personalize.data.stream import MicroBatchStream, PriorStream

SIZES = st.lists(st.sampled_from([(64, 64), (64, 128), (128, 64)]), min_size=1, max_size=12)


@given(SIZES, st.integers(1, 3), st.integers(1, 5), st.integers(0, 3), st.integers(0, 2))
def test_an_epoch_shows_every_image_repeats_times_in_batches_of_one_size(sizes, repeats, batch_size, seed, epoch):
    stream = MicroBatchStream(sizes, repeats, batch_size, seed)
    first = epoch * stream.batches_per_epoch
    batches = [stream.micro_batch(first + i) for i in range(stream.batches_per_epoch)]
    assert Counter(image for batch in batches for image in batch) == dict.fromkeys(range(len(sizes)), repeats)
    assert all(1 <= len(batch) <= batch_size for batch in batches)
    assert all(len({sizes[image] for image in batch}) == 1 for batch in batches)


@given(st.lists(st.integers(1, 3), min_size=1, max_size=12), st.integers(1, 5), st.integers(0, 40), st.data())
def test_images_are_counted_as_they_are_seen(repeats, batch_size, count, data):
    """Those of one concept too, and each as often as it is to be seen."""
    stream = MicroBatchStream([(64, 64)] * len(repeats), repeats, batch_size, seed=0)
    seen = [image for number in range(count) for image in stream.micro_batch(number)]
    assert stream.images_in(count) == len(seen)
    some = data.draw(st.frozensets(st.integers(0, len(repeats) - 1)))
    assert stream.images_in(count, some) == sum(image in some for image in seen)
    epoch = [image for number in range(stream.batches_per_epoch) for image in stream.micro_batch(number)]
    assert Counter(epoch) == dict(enumerate(repeats))


def test_the_order_depends_on_the_seed_and_the_epoch_alone():
    sizes = [(64, 64)] * 20
    one, two = (MicroBatchStream(sizes, 1, 1, seed=0) for _ in range(2))
    orders = [[stream.micro_batch(i)[0] for i in range(40)] for stream in (one, two, MicroBatchStream(sizes, 1, 1, 1))]
    assert two.micro_batch(33) == one.micro_batch(33)
    assert orders[0] == orders[1] != orders[2]
    assert orders[0][:20] != orders[0][20:]


@given(st.integers(1, 9), st.integers(0, 2), st.lists(st.integers(1, 4), min_size=1, max_size=12))
def test_the_prior_is_gone_through_evenly(count, seed, batches):
    stream = PriorStream(count, seed)
    seen: list[int] = []
    for batch in batches:
        seen += stream.images(len(seen), batch)
    for first in range(0, len(seen) - count + 1, count):
        assert sorted(seen[first : first + count]) == list(range(count))
