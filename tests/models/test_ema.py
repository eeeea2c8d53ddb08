from __future__ import annotations

import pytest
import torch
from torch import nn

from improved_diffusion.models.ema import EMA


def model(value: float) -> nn.Linear:
    linear = nn.Linear(2, 3)
    for parameter in linear.parameters():
        nn.init.constant_(parameter, value)
    return linear


def set_value(linear: nn.Module, value: float) -> None:
    with torch.no_grad():
        for parameter in linear.parameters():
            parameter.fill_(value)


def closed_form(initial: float, values: list[float], rate: float) -> float:
    """The average as the weighted sum that it is, each weight a product of decays."""
    decays = [min(rate, (1 + step) / (10 + step)) for step in range(len(values))]
    total, weight = 0.0, 1.0
    for value, decay in zip(reversed(values), reversed(decays), strict=True):
        total += weight * (1 - decay) * value
        weight *= decay
    return total + weight * initial


def test_averages_are_the_closed_form():
    linear, values = model(5.0), [0.3 * step - 2 for step in range(40)]
    ema = EMA(dict(linear.named_parameters()), rates=(0.5, 0.99))
    for step, value in enumerate(values):
        set_value(linear, value)
        ema.update(step)
    for rate in ema.rates:
        for average in ema.weights(rate).values():
            torch.testing.assert_close(average, torch.full_like(average, closed_form(5.0, values, rate)))


def test_a_short_run_forgets_its_initial_weights():
    linear = model(1000.0)
    ema = EMA(dict(linear.named_parameters()), rates=(0.9999,))
    set_value(linear, 1.0)
    for step in range(100):
        ema.update(step)
    assert float(ema.weights(0.9999)["bias"][0]) == pytest.approx(1.0, abs=1e-3)


def test_weights_load_into_a_model():
    ema = EMA(dict(model(2.0).named_parameters()))
    other = model(0.0)
    other.load_state_dict(ema.weights(0.999))
    assert all((p == 2).all() for p in other.parameters())


def test_averages_are_float32_copies():
    linear = model(1.0).bfloat16()
    ema = EMA(dict(linear.named_parameters()))
    set_value(linear, 2.0)
    for average in ema.weights(0.9999).values():
        assert average.dtype == torch.float32
        assert (average == 1).all()


def test_a_resumed_average_goes_on_as_the_unbroken_one(tmp_path):
    values = torch.randn(10, generator=torch.Generator().manual_seed(0)).tolist()
    linear = model(1.0)
    unbroken = EMA(dict(linear.named_parameters()))
    for step, value in enumerate(values):
        set_value(linear, value)
        unbroken.update(step)
        if step == 4:
            torch.save(unbroken.state_dict(), tmp_path / "ema.pt")
    linear = model(-7.0)
    resumed = EMA(dict(linear.named_parameters()))
    resumed.load_state_dict(torch.load(tmp_path / "ema.pt", weights_only=True))
    for step, value in list(enumerate(values))[5:]:
        set_value(linear, value)
        resumed.update(step)
    for rate in unbroken.rates:
        for name, average in unbroken.weights(rate).items():
            assert torch.equal(average, resumed.weights(rate)[name])


def test_loading_copies():
    ema, other = EMA(dict(model(1.0).named_parameters())), EMA(dict(model(2.0).named_parameters()))
    ema.load_state_dict(other.state_dict())
    ema.weights(0.999)["bias"].zero_()
    assert (other.weights(0.999)["bias"] == 2).all()


def test_misuse_is_refused():
    ema = EMA(dict(model(0.0).named_parameters()), rates=(0.9,))
    with pytest.raises(ValueError, match="no average with rate 0.8"):
        ema.weights(0.8)
    with pytest.raises(ValueError, match="saved EMA rates"):
        ema.load_state_dict(EMA(dict(model(0.0).named_parameters()), rates=(0.8,)).state_dict())
    with pytest.raises(ValueError, match="other parameters"):
        ema.load_state_dict(EMA(dict(nn.Linear(2, 4).named_parameters()), rates=(0.9,)).state_dict())
    for rates in ((1.0,), (-0.1,), (0.9, 0.9)):
        with pytest.raises(ValueError, match="EMA rates"):
            EMA(dict(model(0.0).named_parameters()), rates=rates)
