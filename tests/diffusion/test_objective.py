from __future__ import annotations

import pytest
import torch

from improved_diffusion.diffusion.bound import variational_bound
from improved_diffusion.diffusion.denoiser import NetworkDenoiser
from improved_diffusion.diffusion.levels import LossSecondMomentTimesteps
from improved_diffusion.diffusion.objective import Objective, named_objective
from improved_diffusion.diffusion.parameterization import combine
from improved_diffusion.diffusion.schedule import cosine_schedule

PREDICTIONS = ["eps", "x_start", "v"]
T = 50
MSE, VLB = Objective(), Objective(mean_weight=0.0, vlb_weight=T)


def hybrid(vlb_weight: float) -> Objective:
    return Objective(vlb_weight=vlb_weight)


@pytest.fixture
def schedule():
    return cosine_schedule(T)


@pytest.fixture
def batch():
    """x_start (T, 3, 4, 4) on grey levels, every timestep once, and noise."""
    generator = torch.Generator().manual_seed(0)
    x_start = torch.randint(0, 256, (T, 3, 4, 4), generator=generator) / 127.5 - 1
    return x_start, torch.arange(T), torch.randn(x_start.shape, generator=generator)


@pytest.fixture
def output():
    """What a network of six channels returns: a leaf, so that gradients are read per channel."""
    return torch.randn(T, 6, 4, 4, generator=torch.Generator().manual_seed(1)).mul(0.3).requires_grad_()


def gradient(loss: torch.Tensor, output: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Of the sum of `loss`: to the channels of the mean, and to those of the variance."""
    (grad,) = torch.autograd.grad(loss.sum(), output, retain_graph=True)
    return grad[:, :3], grad[:, 3:]


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("loss", [MSE, hybrid(0.05), VLB], ids=["mse", "hybrid", "vlb"])
def test_mse_is_of_the_quantity_that_is_predicted(schedule, batch, prediction, loss):
    x_start, t, noise = batch
    abar = schedule.alphas_cumprod[t].float().view(-1, 1, 1, 1)
    targets = {"eps": noise, "x_start": x_start, "v": abar.sqrt() * noise - (1 - abar).sqrt() * x_start}
    received = []

    def network(x_t, timesteps, y):
        received.append((x_t, timesteps, y))
        return torch.cat([targets[prediction] + 0.5, torch.zeros_like(x_t)], dim=1)

    y = torch.arange(T)
    terms = loss(NetworkDenoiser(network, prediction, "learned_range"), x_start, schedule.at(t), y, noise)
    torch.testing.assert_close(terms.mse, torch.full((T,), 0.25))
    x_t, timesteps, classes = received[0]
    torch.testing.assert_close(x_t, abar.sqrt() * x_start + (1 - abar).sqrt() * noise)
    torch.testing.assert_close(timesteps, torch.arange(T) * 1000 / T)
    assert classes is y
    assert len(received) == 1  # one evaluation of the network serves both terms


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_mse_loss_trains_the_mean_alone(schedule, batch, output, prediction):
    x_start, t, noise = batch
    denoiser = NetworkDenoiser(lambda *_: output, prediction, "learned_range")
    terms = MSE(denoiser, x_start, schedule.at(t), None, noise)
    assert terms.vlb is None
    assert torch.equal(terms.loss, terms.mse)
    mean, variance = gradient(terms.loss, output)
    target = combine(prediction, schedule.at(t), x_start, noise)
    torch.testing.assert_close(mean, 2 * (output[:, :3].detach() - target) / target[0].numel())
    assert (variance == 0).all()


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_hybrid_loss_trains_the_mean_by_mse_and_the_variance_by_the_bound(schedule, batch, output, prediction):
    x_start, t, noise = batch
    denoiser = NetworkDenoiser(lambda *_: output, prediction, "learned_range")
    terms = hybrid(0.05)(denoiser, x_start, schedule.at(t), None, noise)
    torch.testing.assert_close(terms.loss, terms.mse + 0.05 * terms.vlb)

    vlb_to_mean, vlb_to_variance = gradient(terms.vlb, output)
    assert (vlb_to_mean == 0).all()
    assert (vlb_to_variance.flatten(1).abs().sum(1) > 0).all()  # at every timestep, the first and last included
    mean, variance = gradient(terms.loss, output)
    assert torch.equal(mean, gradient(terms.mse, output)[0])
    torch.testing.assert_close(variance, 0.05 * vlb_to_variance)


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_vlb_loss_trains_both(schedule, batch, output, prediction):
    x_start, t, noise = batch
    denoiser = NetworkDenoiser(lambda *_: output, prediction, "learned_range")
    terms = VLB(denoiser, x_start, schedule.at(t), None, noise)
    torch.testing.assert_close(terms.loss, T * terms.vlb)
    assert not terms.mse.requires_grad
    for part in gradient(terms.loss, output):
        assert (part.flatten(1).abs().sum(1) > 0).all()


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_hybrid_and_vlb_see_the_same_bound(schedule, batch, output, prediction):
    x_start, t, noise = batch
    denoiser = NetworkDenoiser(lambda *_: output, prediction, "learned_range")
    of_hybrid = hybrid(1.0)(denoiser, x_start, schedule.at(t), None, noise)
    assert torch.equal(of_hybrid.vlb, VLB(denoiser, x_start, schedule.at(t), None, noise).vlb)


def test_variance_gradient_of_the_bound_is_that_of_the_kl(schedule, batch, output):
    """d KL / d log-variance = (1 - (beta~ + (difference of means)^2) / variance) / 2, by hand."""
    x_start, t, noise = batch
    denoiser = NetworkDenoiser(lambda *_: output, "x_start", "learned_range")
    terms = hybrid(1.0)(denoiser, x_start, schedule.at(t), None, noise)
    _, variance_gradient = gradient(terms.vlb, output)

    def column(table):
        return table.view(-1, 1, 1, 1)

    predicted, v = output.detach().double().chunk(2, dim=1)
    upper, lower = column(schedule.betas.log()), column(schedule.posterior_log_variance)
    variance = torch.exp(lower + (v + 1) / 2 * (upper - lower))
    difference = column(schedule.posterior_mean_coef1) * (predicted - x_start)
    to_log_variance = 0.5 * (1 - (column(schedule.posterior_variance) + difference**2) / variance)
    expected = to_log_variance * (upper - lower) / 2 / x_start[0].numel() / torch.log(torch.tensor(2.0))
    torch.testing.assert_close(variance_gradient[1:].double(), expected[1:], rtol=1e-3, atol=1e-9)


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_vlb_loss_at_uniform_t_is_the_bound_in_expectation(schedule, prediction):
    generator = torch.Generator().manual_seed(0)
    image = torch.randint(0, 256, (1, 3, 4, 4), generator=generator) / 127.5 - 1
    noise = torch.randn(image.shape, generator=generator)

    def network(x_t, timesteps, y):
        return torch.cat([0.7 * x_t, torch.sin(x_t)], dim=1)

    denoiser = NetworkDenoiser(network, prediction, "learned_range")
    bound = variational_bound(denoiser, schedule, image, None, lambda: noise)
    t = torch.arange(T)
    losses = VLB(denoiser, image.expand(T, -1, -1, -1), schedule.at(t), None, noise.expand(T, -1, -1, -1)).loss
    torch.testing.assert_close(losses.mean(), bound.vlb.sum(), rtol=1e-4, atol=0)

    # and with the importance weights of a sampler that has learnt where the losses are large
    sampler = LossSecondMomentTimesteps(T)
    for _ in range(sampler.history_length):
        sampler.update(t, losses / T)
    p = sampler.probabilities()
    assert p.max() > 2 * p.min()
    expected = (p * losses / (T * p)).sum()
    torch.testing.assert_close(expected, bound.vlb.sum().double(), rtol=1e-4, atol=0)
    drawn, weights = sampler.sample(20_000, generator)
    estimates = weights * losses[drawn]
    error = estimates.std().item() / len(drawn) ** 0.5
    assert estimates.mean().item() == pytest.approx(bound.vlb.sum().item(), abs=5 * error)


def test_losses_are_float32_whatever_the_network_computes_in(schedule, batch):
    x_start, t, noise = batch
    denoiser = NetworkDenoiser(lambda x_t, *_: torch.cat([x_t, x_t], dim=1).bfloat16(), "eps", "learned_range")
    for name in ("mse", "hybrid", "vlb"):
        terms = named_objective(name, timesteps=T, vlb_weight=0.05)(denoiser, x_start, schedule.at(t), None, noise)
        assert terms.loss.shape == terms.mse.shape == (T,)
        assert terms.loss.dtype == terms.mse.dtype == torch.float32
        assert terms.vlb is None or terms.vlb.dtype == torch.float32


@pytest.mark.parametrize("name", ["mse", "hybrid", "vlb"])
def test_the_three_named_products(schedule, batch, output, name):
    x_start, t, noise = batch
    denoiser = NetworkDenoiser(lambda *_: output, "eps", "learned_range")
    terms = named_objective(name, timesteps=T, vlb_weight=0.02)(denoiser, x_start, schedule.at(t), None, noise)
    expected = {
        "mse": lambda: terms.mse,
        "hybrid": lambda: terms.mse + 0.02 * terms.vlb,
        "vlb": lambda: T * terms.vlb,
    }[name]()
    torch.testing.assert_close(terms.loss, expected)


def test_each_image_is_judged_alone(schedule, batch, output):
    """The terms of an image do not depend on the rest of its batch."""
    x_start, t, noise = batch
    denoiser = NetworkDenoiser(lambda *_: output, "eps", "learned_range")
    all_terms = hybrid(1.0)(denoiser, x_start, schedule.at(t), None, noise)
    i = slice(7, 8)
    denoiser = NetworkDenoiser(lambda *_: output[i], "eps", "learned_range")
    alone = hybrid(1.0)(denoiser, x_start[i], schedule.at(t[i]), None, noise[i])
    torch.testing.assert_close(all_terms.loss[i], alone.loss)
