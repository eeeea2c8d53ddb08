"""What needs the steps of a grid says so where there are none."""

from __future__ import annotations

import pytest
import torch

from improved_diffusion.diffusion.bound import bound_term
from improved_diffusion.diffusion.denoiser import Prediction
from improved_diffusion.diffusion.objective import named_objective
from improved_diffusion.diffusion.process import RectifiedFlow
from improved_diffusion.diffusion.schedule import cosine_schedule


def test_the_bound_needs_a_reverse_step_and_a_variance():
    x = torch.zeros(2, 3, 4, 4)
    in_continuous_time = RectifiedFlow().at(torch.tensor(0.5, dtype=torch.float64))
    with pytest.raises(ValueError, match="no reverse step"):
        bound_term(in_continuous_time, x, x, Prediction(x, x, x))
    with pytest.raises(ValueError, match="no variance"):
        bound_term(cosine_schedule(10).at(5), x, x, Prediction(x, x))


def test_the_vlb_objective_needs_steps():
    with pytest.raises(ValueError, match="T steps"):
        named_objective("vlb", timesteps=None, vlb_weight=0.0)
