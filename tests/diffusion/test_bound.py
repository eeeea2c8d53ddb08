from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy.stats import norm

from improved_diffusion.diffusion.bound import bound_term, prior_term, variational_bound
from improved_diffusion.diffusion.denoiser import NetworkDenoiser, Prediction
from improved_diffusion.diffusion.parameterization import eps_from_x_start, q_sample
from improved_diffusion.diffusion.schedule import SCHEDULES, cosine_schedule, evenly_spaced, respace

MEAN, STD = 0.1, 0.2  # of the analytic data


def bits(nats):
    return nats / math.log(2)


def gaussian_quadrature(nodes: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Pixels x_0 ~ N(MEAN, STD^2), noises eps ~ N(0, 1), and the weights that turn sums into expectations over both."""
    points, weights = np.polynomial.hermite_e.hermegauss(nodes)
    weights = weights / weights.sum()
    x, eps = np.meshgrid(points, points, indexing="ij")
    as_images = [torch.tensor(values).reshape(-1, 1, 1, 1) for values in (MEAN + STD * x, eps)]
    return *as_images, torch.tensor(np.outer(weights, weights).ravel())


@pytest.fixture(params=["cosine", "linear", "respaced"])
def schedule(request):
    if request.param == "respaced":
        return respace(cosine_schedule(200), evenly_spaced(200, 30))
    return SCHEDULES[request.param](50)


def test_terms_of_a_perfect_model(schedule, analytic_gaussian):
    """For the perfect model, L_t is the mutual information of x_0 and x_{t-1} given x_t:
    (log Var[x_{t-1} | x_t] - log Var[x_{t-1} | x_t, x_0]) / 2. The KL is a polynomial, so quadrature is exact."""
    denoiser = analytic_gaussian(schedule, MEAN, STD)
    x_start, noise, weights = gaussian_quadrature(3)
    bound = variational_bound(denoiser, schedule, x_start, None, lambda: noise)
    expected_terms = weights @ bound.vlb

    zero = torch.zeros(1, 1, 1, 1, dtype=torch.float64)
    for t in range(1, len(schedule)):
        log_variance = denoiser(zero, schedule.at(t), None).log_variance.item()
        expected = bits(0.5 * (log_variance - schedule.posterior_variance[t].log().item()))
        assert expected_terms[t].item() == pytest.approx(expected, rel=1e-8, abs=1e-12)


def test_bound_of_a_perfect_model_is_the_entropy_of_its_data(schedule, analytic_gaussian):
    """All terms together: E[-log p(x_0)] for N(MEAN, STD^2) pixels read on grey levels 2 / 255 apart, and what p(x_T)
    = N(0, 1) is off."""
    denoiser = analytic_gaussian(schedule, MEAN, STD)
    x_start, noise, weights = gaussian_quadrature(9)
    bound = variational_bound(denoiser, schedule, x_start, None, lambda: noise)
    abar = schedule.alphas_cumprod[-1].item()
    variance = abar * STD**2 + 1 - abar
    mismatch = 0.5 * (variance + abar * MEAN**2 - 1 - math.log(variance))  # KL(q(x_T) || N(0, 1))
    entropy = 0.5 * math.log(2 * math.pi * math.e * STD**2) - math.log(2 / 255)
    assert (weights @ bound.total).item() == pytest.approx(bits(entropy + mismatch), abs=2e-3)


def test_first_term_is_the_likelihood_of_the_pixel(analytic_gaussian):
    schedule = cosine_schedule(50)
    denoiser = analytic_gaussian(schedule, MEAN, STD)
    levels = torch.tensor([90, 127, 140, 200], dtype=torch.float64).reshape(-1, 1, 1, 1)
    x_start, level = levels / 127.5 - 1, schedule.at(0)
    noise = torch.randn(4, 1, 1, 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    x_1 = q_sample(level, x_start, noise)
    term = bound_term(level, x_start, x_1, denoiser(x_1, level, None))

    # p(x_0 | x_1) by Bayes: the prior N(MEAN, STD^2) times the likelihood of x_1
    abar = schedule.alphas_cumprod[0].item()
    precision = 1 / STD**2 + abar / (1 - abar)
    mean = (MEAN / STD**2 + math.sqrt(abar) * x_1.numpy() / (1 - abar)) / precision
    borders = [norm.cdf((levels.numpy() + half) / 127.5 - 1, mean, precision**-0.5) for half in (-0.5, 0.5)]
    np.testing.assert_allclose(term, -np.log2(borders[1] - borders[0]).ravel(), rtol=1e-8)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("last", [20, 100, 199])
def test_prior_term(last, dtype):
    """KL(N(sqrt(abar) x_0, 1 - abar) || N(0, 1)): large where the process ends early, else tiny, right in float32."""
    schedule = respace(cosine_schedule(200), [0, last])
    abar = schedule.alphas_cumprod[-1].item()
    x_start = torch.linspace(-1, 1, 32, dtype=dtype).reshape(2, 1, 4, 4)
    nats = 0.5 * (abar * x_start.double() ** 2 - abar - math.log1p(-abar)).flatten(1).mean(1)
    expected = bits(nats).to(dtype)
    torch.testing.assert_close(prior_term(schedule, x_start), expected, rtol=1e-3, atol=0)


def test_terms_are_kl_divergences_by_monte_carlo():
    """Of an imperfect model, too: E_q[log q(x_{t-1} | x_t, x_0) - log p(x_{t-1} | x_t)]."""
    schedule, t, n = cosine_schedule(20), 12, 200_000
    x_start, x_t, guess, log_variance = 0.4, -0.3, 0.1, -2.0
    beta, abar_prev = schedule.betas[t].item(), schedule.alphas_cumprod[t - 1].item()
    precision = 1 / (1 - abar_prev) + (1 - beta) / beta

    def mean(x_0):
        return (math.sqrt(abar_prev) * x_0 / (1 - abar_prev) + math.sqrt(1 - beta) * x_t / beta) / precision

    samples = norm.rvs(mean(x_start), precision**-0.5, size=n, random_state=0)
    log_q = norm.logpdf(samples, mean(x_start), precision**-0.5)
    log_ratio = log_q - norm.logpdf(samples, mean(guess), math.exp(log_variance / 2))

    image = torch.ones(1, 1, 1, 1, dtype=torch.float64)
    eps = eps_from_x_start(schedule.at(t), x_t * image, guess * image)
    prediction = Prediction(guess * image, eps, log_variance * image)
    term = bound_term(schedule.at(t), x_start * image, x_t * image, prediction).item()
    assert term == pytest.approx(bits(log_ratio.mean()), abs=5 * log_ratio.std() / math.sqrt(n))


def zero_network(x_t, t, y):
    return torch.zeros_like(x_t)


@pytest.mark.parametrize("timesteps", [200, 1000])
def test_untrained_network_pays_for_the_capped_last_beta(timesteps):
    """A network that predicts eps = 0 pays (SNR_{t-1} - SNR_t) / 2 per unit of squared error of x_0, which is
    (1 - abar_t) / abar_t: about 0.999 / 0.001 / 2 nats = 721 bits/dim where beta is capped at 0.999."""
    schedule = cosine_schedule(timesteps)
    denoiser = NetworkDenoiser(zero_network, "eps", "fixed_small")
    generator = torch.Generator().manual_seed(0)
    x_start = torch.rand(4, 3, 16, 16, generator=generator) * 2 - 1
    bound = variational_bound(
        denoiser, schedule, x_start, None, lambda: torch.randn(x_start.shape, generator=generator)
    )
    terms = bound.vlb.mean(0)
    assert terms[-1].item() == pytest.approx(721, rel=0.08)

    snr = schedule.alphas_cumprod / (1 - schedule.alphas_cumprod)
    expected = bits(0.5 * (snr[:-1] / snr[1:] - 1))
    torch.testing.assert_close(terms[1:].double(), expected, rtol=0.15, atol=0)
    assert terms[1:-1].mean() < 25 / timesteps
    assert terms[1:-1].mean() * 1000 < terms[-1]


def test_721_bits_within_one_percent():
    schedule = cosine_schedule(1000)
    denoiser = NetworkDenoiser(zero_network, "eps", "fixed_small")
    generator = torch.Generator().manual_seed(0)
    x_start = torch.rand(1, 1, 400, 400, generator=generator) * 2 - 1
    level = schedule.at(999)
    x_t = q_sample(level, x_start, torch.randn(x_start.shape, generator=generator))
    assert bound_term(level, x_start, x_t, denoiser(x_t, level, None)).item() == pytest.approx(721, rel=0.01)


def test_variational_bound_reports_each_timestep_in_its_column(schedule):
    """Every column is what `bound_term` says of that timestep alone, and the noise is drawn from T-1 down."""
    noises = []

    def draw_noise():
        noises.append(torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(len(noises))))
        return noises[-1]

    classes = []

    def network(x_t, t, y):
        classes.append(y)
        return 0.5 * x_t

    y = torch.tensor([3, 7])
    denoiser = NetworkDenoiser(network, "eps", "fixed_large")
    x_start = torch.rand(2, 3, 4, 4, generator=torch.Generator().manual_seed(99)) * 2 - 1
    bound = variational_bound(denoiser, schedule, x_start, y, draw_noise)
    steps = len(schedule)
    assert len(noises) == steps
    assert all(given is y for given in classes)
    assert bound.vlb.shape == bound.xstart_mse.shape == bound.mse.shape == (2, steps)
    for step in (0, 1, steps // 2, steps - 1):
        level = schedule.at(torch.full((2,), step))
        noise = noises[steps - 1 - step]
        x_t = q_sample(level, x_start, noise)
        prediction = denoiser(x_t, level, y)
        torch.testing.assert_close(bound.vlb[:, step], bound_term(level, x_start, x_t, prediction))
        torch.testing.assert_close(bound.mse[:, step], (0.5 * x_t - noise).square().mean((1, 2, 3)))
        error = prediction.x_start - x_start
        torch.testing.assert_close(bound.xstart_mse[:, step], error.square().mean((1, 2, 3)))
    torch.testing.assert_close(bound.prior, prior_term(schedule, x_start))
    torch.testing.assert_close(bound.total, bound.vlb.sum(1) + bound.prior)


def test_a_single_timestep_has_only_the_decoder():
    schedule = cosine_schedule(1)
    denoiser = NetworkDenoiser(zero_network, "x_start", "fixed_small")
    bound = variational_bound(denoiser, schedule, torch.zeros(1, 1, 2, 2), None, lambda: torch.zeros(1, 1, 2, 2))
    half = 1 / 255 / math.sqrt(0.999)
    assert bound.vlb.item() == pytest.approx(-math.log2(norm.cdf(half) - norm.cdf(-half)), rel=1e-4)


@pytest.mark.parametrize("prediction", ["eps", "x_start", "v"])
def test_gradient_of_an_untrained_network_is_finite_at_every_timestep(prediction):
    schedule = cosine_schedule(1000)
    output = torch.zeros(1000, 6, 4, 4, requires_grad=True)
    denoiser = NetworkDenoiser(lambda x_t, t, y: output, prediction, "learned_range")
    generator = torch.Generator().manual_seed(0)
    x_start = torch.randint(0, 256, (1000, 3, 4, 4), generator=generator) / 127.5 - 1
    level = schedule.at(torch.arange(1000))
    x_t = q_sample(level, x_start, torch.randn(x_start.shape, generator=generator))
    bound_term(level, x_start, x_t, denoiser(x_t, level, None)).sum().backward()
    assert output.grad.isfinite().all()
