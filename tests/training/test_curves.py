"""Curves are drawn of whatever a run has recorded so far."""

from __future__ import annotations

import json

import pytest
from matplotlib.axes import Axes
from PIL import Image

from improved_diffusion.run_directory import RunDirectory
from improved_diffusion.training.curves import draw_curves

MSE = {"loss": 1.0, "mse": 1.0, "mse_q0": 2.0, "mse_q3": 0.5}
BOUND = {**MSE, "vlb": 0.1, "vlb_q0": 0.2}


@pytest.mark.parametrize(
    ("terms", "lines"),
    [
        (None, []),
        (MSE, ["loss", "mse", "mse_q0", "mse_q3"]),
        (BOUND, ["loss", "mse", "vlb_q0"]),
    ],
    ids=["nothing", "mse", "bound"],
)
def test_lines_of_what_there_is(tmp_path, monkeypatch, terms, lines):
    labels = []
    monkeypatch.setattr(Axes, "legend", lambda axes: labels.extend(axes.get_legend_handles_labels()[1]))
    run = RunDirectory(tmp_path)
    records = [] if terms is None else [{"step": step, **terms} for step in (1, 2)]
    run.metrics_file.write_text("".join(json.dumps(record) + "\n" for record in records))
    draw_curves(run)
    assert labels == lines
    with Image.open(run.curves_file) as picture:
        assert picture.size == (1500, 400)
