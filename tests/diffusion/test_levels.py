from __future__ import annotations

import math
from collections import deque

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import chisquare, kstest, norm

from improved_diffusion.diffusion.levels import (
    DRAWS,
    LEVEL_SAMPLERS,
    LossSecondMomentTimesteps,
    UniformTimesteps,
    log_normal,
    make_level_sampler,
)
from improved_diffusion.diffusion.process import PROCESSES, TabulatedProcess
from improved_diffusion.diffusion.schedule import cosine_schedule


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def learnt(losses: np.ndarray) -> LossSecondMomentTimesteps:
    """A sampler that was shown the columns of `losses` (T, k), one after another."""
    sampler = LossSecondMomentTimesteps(len(losses))
    for column in losses.T:
        sampler.update(torch.arange(len(losses)), torch.tensor(column))
    return sampler


def steps(timesteps: int) -> TabulatedProcess:
    return cosine_schedule(timesteps).process


@pytest.mark.parametrize("name", LEVEL_SAMPLERS)
@pytest.mark.parametrize("timesteps", [1, 2, 1000])
@pytest.mark.parametrize("n", [1, 7])
def test_samples_are_timesteps_with_weights_and_follow_the_generator(name, timesteps, n):
    t, weights = make_level_sampler(name, steps(timesteps)).sample(n, generator(3))
    assert (t.dtype, weights.dtype) == (torch.int64, torch.float32)
    assert t.shape == weights.shape == (n,)
    assert ((t >= 0) & (t < timesteps)).all()
    torch.testing.assert_close(weights, torch.ones(n))  # before anything is learnt
    again, _ = make_level_sampler(name, steps(timesteps)).sample(n, generator(3))
    assert torch.equal(t, again)


@pytest.mark.parametrize("name", DRAWS)
@pytest.mark.parametrize("process", PROCESSES.values(), ids=PROCESSES.keys())
def test_in_continuous_time_samples_are_levels(name, process):
    process = process()
    t, weights = make_level_sampler(name, process).sample(1000, generator(3))
    assert (t.dtype, weights.dtype) == (torch.float64, torch.float32)
    assert ((t >= 0) & (t <= process.last_level)).all()
    torch.testing.assert_close(weights, torch.ones(1000))


@pytest.mark.parametrize("process", PROCESSES.values(), ids=PROCESSES.keys())
def test_log_normal_levels_have_log_normal_noise(process):
    process = process()
    t, _ = make_level_sampler("log_normal", process).sample(5000, generator())
    assert kstest(process.at(t).noise_to_signal.log(), norm(-1.2, 1.2).cdf).pvalue > 1e-3


def test_of_a_process_of_steps_the_nearest_one_has_a_log_normal_level():
    process = steps(20)
    for index in range(20):
        level = process.at(torch.tensor((index + 1) / 20, dtype=torch.float64))
        near = float(level.noise_to_signal.log())
        for off in (-1e-6, 1e-6):
            t = log_normal(process, 1, generator(), mean=near + off, std=0.0)
            assert int(t * 20) == index


def test_logit_normal_levels_are_logit_normal():
    t, _ = make_level_sampler("logit_normal", PROCESSES["flow"]()).sample(5000, generator())
    assert kstest(torch.logit(t), norm.cdf).pvalue > 1e-3


@pytest.mark.parametrize("name", ["log_normal", "logit_normal"])
def test_of_a_process_of_steps_the_step_of_a_drawn_level_is_taken(name):
    process = steps(10)
    t, _ = make_level_sampler(name, process).sample(100, generator(5))
    drawn = DRAWS[name](process, 100, generator(5))
    assert ((t <= drawn * 10) & (drawn * 10 <= t + 1)).all()


def test_what_remembers_steps_needs_steps():
    with pytest.raises(ValueError, match="loss_second_moment .* needs a process of T steps"):
        make_level_sampler("loss_second_moment", PROCESSES["flow"]())


@pytest.mark.parametrize("name", ["uniform", "stratified", "loss_second_moment"])
def test_marginal_distribution_is_uniform(name):
    g, sampler = generator(), make_level_sampler(name, steps(7))
    drawn = torch.cat([sampler.sample(5, g)[0] for _ in range(4000)])
    counts = torch.bincount(drawn, minlength=7)
    # Strata are spread more evenly than chance, hence only the upper tail.
    assert chisquare(counts).pvalue > 1e-3


@pytest.mark.parametrize("position", [0, 4])
def test_every_position_of_a_stratified_batch_is_uniform(position):
    g, sampler = generator(), make_level_sampler("stratified", steps(10))
    drawn = torch.stack([sampler.sample(5, g)[0][position] for _ in range(5000)])
    assert chisquare(torch.bincount(drawn, minlength=10)).pvalue > 1e-3


@given(st.integers(1, 60), st.integers(1, 60), st.integers(0, 1000))
def test_stratified_draws_one_from_each_stratum(n, timesteps, seed):
    t, _ = make_level_sampler("stratified", steps(timesteps)).sample(n, generator(seed))
    for stratum, step in enumerate(sorted(t.tolist())):
        assert math.floor(stratum * timesteps / n) <= step <= math.ceil((stratum + 1) * timesteps / n) - 1


def test_uniform_sampler_does_not_learn():
    sampler = UniformTimesteps(3)
    sampler.update(torch.tensor([0]), torch.tensor([100.0]))
    sampler.load_state_dict(sampler.state_dict())
    assert sampler.state_dict() == {}
    assert not sampler.learns
    assert LossSecondMomentTimesteps.learns


def test_uniform_until_every_timestep_has_ten_losses():
    rng = np.random.default_rng(0)
    sampler = learnt(rng.uniform(1, 100, (4, 9)))
    sampler.update(torch.tensor([0, 1, 2, 2, 2]), torch.tensor([5.0, 6, 7, 8, 9]))
    np.testing.assert_array_equal(sampler.probabilities(), [0.25] * 4)
    sampler.update(torch.tensor([3]), torch.tensor([50.0]))
    assert sampler.probabilities().std() > 0.01


@given(st.lists(st.lists(st.tuples(st.integers(0, 3), st.floats(0, 9) | st.just(math.nan)), max_size=40), max_size=5))
def test_the_last_ten_losses_of_each_timestep_are_remembered(batches):
    sampler, histories = LossSecondMomentTimesteps(4), [deque([0.0] * 10, maxlen=10) for _ in range(4)]
    for batch in batches:
        t, losses = torch.tensor([t for t, _ in batch], dtype=torch.int64), torch.tensor([loss for _, loss in batch])
        sampler.update(t, losses)
        for step, loss in zip(t.tolist(), losses.tolist(), strict=True):
            if math.isfinite(loss):
                histories[step].append(loss)
    np.testing.assert_array_equal(sampler.losses, [list(history) for history in histories])
    seen = [sum(t == step and math.isfinite(loss) for batch in batches for t, loss in batch) for step in range(4)]
    assert sampler.counts.tolist() == [min(10, n) for n in seen]


@given(
    st.integers(2, 30).flatmap(
        lambda n: st.lists(st.lists(st.floats(1e-3, 1e3), min_size=14, max_size=14), min_size=n, max_size=n)
    )
)
def test_probabilities_are_root_second_moments_of_the_last_ten(losses):
    losses = np.array(losses)
    losses[-1] = losses[:-1].min()  # the last timestep below the others: its cap is tested elsewhere
    root_moments = np.sqrt(np.mean(losses[:, -10:] ** 2, axis=1))
    expected = 0.999 * root_moments / root_moments.sum() + 0.001 / len(losses)
    p = learnt(losses).probabilities()
    np.testing.assert_allclose(p, expected, rtol=1e-9)
    assert p.sum().item() == pytest.approx(1)


def test_repeated_timesteps_in_a_batch_are_all_kept_in_order():
    sampler = learnt(np.ones((2, 10)))
    sampler.update(torch.tensor([0] * 9), torch.arange(2.0, 11.0))
    expected = math.sqrt((1 + sum(x**2 for x in range(2, 11))) / 10)
    sampler.update(torch.tensor([1] * 12), torch.full((12,), expected))
    np.testing.assert_allclose(sampler.probabilities(), [0.5, 0.5])


def test_draws_follow_the_probabilities():
    sampler = learnt(np.tile([[1.0], [2.0], [4.0], [3.0]], 10))
    n = 20_000
    t, _ = sampler.sample(n, generator())
    assert chisquare(torch.bincount(t, minlength=4), sampler.probabilities() * n).pvalue > 1e-3


@given(st.lists(st.floats(1e-3, 1e3), min_size=1, max_size=40), st.integers(2, 100), st.integers(0, 2**31))
def test_draws_are_those_of_torch_multinomial(losses, n, seed):
    """By which older runs drew, on the CPU: resumed, they go on as they would have."""
    sampler = learnt(np.tile(np.array(losses)[:, None], 10))
    expected = torch.multinomial(sampler.probabilities(), n, replacement=True, generator=generator(seed))
    assert torch.equal(sampler.sample(n, generator(seed))[0], expected)


@given(st.lists(st.floats(1e-3, 1e3), min_size=1, max_size=40), st.integers(0, 2**31))
def test_weights_are_unbiased(losses, seed):
    """E_p[w f] = mean f for any f: the weight at t is 1 / (T p_t)."""
    sampler = learnt(np.tile(np.array(losses)[:, None], 10))
    p = sampler.probabilities()
    f = np.random.default_rng(seed).normal(size=len(losses))
    t, drawn_weights = sampler.sample(200, generator(seed))
    weight = dict(zip(t.tolist(), drawn_weights.tolist(), strict=True))
    for step, value in weight.items():
        assert value == pytest.approx(1 / (len(losses) * p[step].item()), rel=1e-6)
    if len(weight) == len(losses):
        weights = np.array([weight[step] for step in range(len(losses))])
        assert (p.numpy() * weights * f).sum() == pytest.approx(f.mean(), rel=1e-5, abs=1e-6)


@pytest.mark.parametrize("timesteps", [200, 1000])
def test_the_last_term_of_an_untrained_network_does_not_drown_the_others(timesteps):
    """721 bits/dim at t = T-1 against 0.02 elsewhere would be 97 % of all draws at T = 1000."""
    losses = np.full((timesteps, 10), 0.02)
    losses[-1] = 721
    p = learnt(losses).probabilities()
    np.testing.assert_allclose(p, 1 / timesteps, rtol=1e-9)

    losses[3] = 0.2  # a large term elsewhere counts in full, and the last as much as it
    p = learnt(losses).probabilities()
    assert p[3] / p[0] == pytest.approx(10, rel=0.05)
    assert p[-1] == p[3]


@pytest.mark.parametrize("shown", [3, 13])
def test_history_survives_a_checkpoint(shown, tmp_path):
    rng = np.random.default_rng(0)
    sampler = learnt(rng.uniform(0.1, 2, (6, shown)))
    torch.save(sampler.state_dict(), tmp_path / "state.pt")
    resumed = LossSecondMomentTimesteps(6)
    resumed.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    for _ in range(12):
        for each in (sampler, resumed):
            t, weights = each.sample(8, generator(1))
            each.update(t, weights + t)
            each.update(torch.arange(6), torch.arange(6.0) + 1)
        assert torch.equal(sampler.probabilities(), resumed.probabilities())
    assert resumed.probabilities().std() > 0


def test_saved_state_is_a_copy():
    sampler = learnt(np.ones((2, 10)))
    state = sampler.state_dict()
    sampler.update(torch.tensor([0]), torch.tensor([100.0]))
    assert (state["losses"] == 1).all()
