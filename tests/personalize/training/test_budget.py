from __future__ import annotations

import pytest

from improved_diffusion.errors import UserError
from improved_diffusion.personalize.config import PersonalizeConfig, TrainingConfig, WatchConfig
from improved_diffusion.personalize.data.stream import MicroBatchStream
from improved_diffusion.personalize.training.budget import Counters, plan, plan_looks, require_same_updates

SQUARE, TALL = (64, 64), (128, 64)


@pytest.mark.parametrize(
    ("sizes", "repeats", "training", "processes", "total", "epochs"),
    [
        # the Pokemon set: 833 images, batch 1, accumulation 4, 5,000 micro-steps are 1,250 updates and 6 epochs
        ([SQUARE] * 833, 1, TrainingConfig(steps=1250, accumulation=4), 1, Counters(1250, 5000, 0), 5000 / 833),
        # 500 epochs of 10 pictures
        ([SQUARE] * 10, 1, TrainingConfig(epochs=500), 1, Counters(5000, 5000, 0), 500),
        # 5 images in batches of 2: 2 + 2 + 1
        ([SQUARE] * 5, 1, TrainingConfig(steps=3, batch_size=2), 1, Counters(3, 5, 0), 1),
        # 3 square and 2 tall ones, twice each, in batches of 4: 4 + 2 and 4
        ([SQUARE] * 3 + [TALL] * 2, 2, TrainingConfig(epochs=1, batch_size=4), 1, Counters(3, 10, 0), 1),
        # two processes share the batches of an update
        ([SQUARE] * 8, 1, TrainingConfig(epochs=2, accumulation=2), 2, Counters(4, 16, 0), 2),
    ],
    ids=["pokemon", "cartoon", "short batch", "buckets", "processes"],
)
def test_the_arithmetic_by_hand(sizes, repeats, training, processes, total, epochs):
    stream = MicroBatchStream(sizes, repeats, training.batch_size, seed=0)
    budget = plan(stream, training, processes)
    assert budget.total == total
    assert budget.epochs == pytest.approx(epochs)


def test_it_says_what_it_counts():
    stream = MicroBatchStream([SQUARE] * 833, 1, 1, seed=0)
    text = str(plan(stream, TrainingConfig(steps=1250, accumulation=4), 1, with_prior=range(833)))
    assert text == (
        "833 images x 1 repeats / batch 1 = 833 batches an epoch / accumulation 4 = 208.25 updates an epoch; "
        "in all 6.0 epochs: 1,250 updates, 5,000 images seen, 5,000 of the prior"
    )


def test_no_length_at_all():
    with pytest.raises(UserError, match=r"how long to train\? give training.steps"):
        plan(MicroBatchStream([SQUARE], 1, 1, seed=0), TrainingConfig(), 1)


@pytest.mark.parametrize(
    ("accumulation", "processes", "advice"),
    [
        (1, 8, None),
        (8, 1, None),
        (2, 4, None),
        (1, 1, "set training.accumulation to 8"),
        (1, 2, "set training.accumulation to 4"),
        (3, 3, "start fewer or more processes"),
    ],
)
def test_a_resumed_run_takes_as_many_micro_batches_an_update(accumulation, processes, advice):
    """Five images in batches of 2, so that an update may see more images or fewer: its first run had 8 processes."""
    stream = MicroBatchStream([SQUARE] * 5, 1, 2, seed=0)
    seen = plan(stream, TrainingConfig(steps=7, batch_size=2), 8).total.images_seen
    training = TrainingConfig(steps=20, batch_size=2, accumulation=accumulation)
    budget = plan(stream, training, processes)
    if advice is None:
        require_same_updates(stream, budget, 7, seen)
    else:
        with pytest.raises(UserError, match=f"takes 8 micro-batches, .*{advice}"):
            require_same_updates(stream, budget, 7, seen)


@pytest.mark.parametrize(
    ("watch", "every", "count", "share"),
    [
        # 1,000 updates of LoRA are 2,000 evaluations; a look at 1 picture in 10 steps with guidance is 20
        (WatchConfig(every=100, steps=10, seeds=(0,)), 100, 11, 220 / 2220),
        (WatchConfig(every=20, steps=10, seeds=(0,)), 80, 14, 280 / 2280),  # 18, every 60, are too many
        (WatchConfig(every=20, steps=10, seeds=(0,), share=1), 20, 51, 1020 / 3020),
        (WatchConfig(every=20, steps=10, seeds=(0,), guidance_scale=1), 40, 26, 260 / 2260),
        (WatchConfig(every=100, steps=50, seeds=tuple(range(10))), 1000, 2, 2000 / 4000),  # the first and the last
        (WatchConfig(every=None), None, 0, 0),
    ],
)
def test_looks_keep_to_their_share(watch, every, count, share):
    config = PersonalizeConfig(training=TrainingConfig(steps=1000), watch=watch)
    looks = plan_looks(config, Counters(1000, 1000, 0), prompts=1, held_out=0)
    assert (looks.every, looks.count, looks.share) == (every, count, pytest.approx(share))
    assert ("above watch.share" in str(looks)) == (share > watch.share)


def test_what_an_update_and_a_look_cost():
    """With all weights trained and computed twice, a prior, and a loss on held-out images."""
    config = PersonalizeConfig(
        method="full",
        training=TrainingConfig(steps=100, gradient_checkpointing=True),
        watch=WatchConfig(every=100, steps=5, seeds=(0, 1), share=1, loss_timesteps=(10, 20)),
    )
    looks = plan_looks(config, Counters(100, 100, 100), prompts=3, held_out=4)
    assert looks.of_training == 200 * (1 + 2 + 1)
    assert looks.evaluations == 2 * (3 * 2 * 5 * 2 + 4 * 2)
