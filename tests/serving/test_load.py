"""The load of benchmarks/serving.py, made small: many users at once, kills, no memory."""

from __future__ import annotations

import importlib.util
import multiprocessing
import sys
from pathlib import Path

BENCHMARK = Path(__file__).parents[2] / "benchmarks" / "serving.py"


def test_a_burst_with_kills_loses_nothing_and_sends_nothing_twice(tiny_run, tmp_path, monkeypatch):
    spec = importlib.util.spec_from_file_location("benchmark_of_serving", BENCHMARK)
    benchmark = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, benchmark)
    spec.loader.exec_module(benchmark)
    disturbance = benchmark.Disturbance(worker_kills=1, bot_kills=1, no_memory=2)
    context = multiprocessing.get_context("fork")  # none takes seconds to import torch
    config = benchmark.server(tmp_path / "home", 6, 2, str(tiny_run))
    outcome = benchmark.burst(context, config, 6, 2, disturbance)
    assert (outcome.jobs, outcome.lost, outcome.twice) == (12, 0, 0)
    assert outcome.unsure <= 6
