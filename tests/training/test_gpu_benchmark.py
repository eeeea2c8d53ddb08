"""benchmarks/gpu.py: its small form, which runs where there is no GPU, and what it does where a GPU fails it."""

from __future__ import annotations

import json
import runpy
import signal
import time
from pathlib import Path

import pytest
import torch

PROJECT = Path(__file__).parents[2]


@pytest.fixture
def benchmark_files(monkeypatch):
    """Lets its parts be imported, as they are for who runs it as a script."""
    monkeypatch.syspath_prepend(PROJECT / "benchmarks")


@pytest.mark.usefixtures("benchmark_files")
def test_without_a_gpu_a_small_form_runs(run_script, tmp_path):
    outcome = run_script("benchmarks/gpu.py", "--out", tmp_path / "out")
    assert outcome.code == 0, outcome.out + outcome.err
    assert outcome.out.startswith("there is no GPU here")
    report = json.loads((tmp_path / "out" / "gpu.json").read_text())
    parts = report["parts"]
    assert set(parts) == {"correctness", "training", "sampling", "noise", "measuring"}
    assert all(row["passed"] for row in parts["correctness"])
    assert parts["correctness"][-1]["bit_equal"]
    assert all("note" not in row for rows in parts.values() for row in rows)
    assert all(row["images_per_second"] > 0 for row in parts["training"] + parts["sampling"])
    table = (tmp_path / "out" / "gpu.md").read_text()
    assert "### Training" in table
    assert table.count("\n| ") == sum(map(len, parts.values())) + 2 * len(parts)


@pytest.mark.usefixtures("benchmark_files")
def test_a_case_that_fails_is_a_line():
    script = runpy.run_path(str(PROJECT / "benchmarks" / "gpu.py"))
    signal.signal(signal.SIGALRM, script["ring"])

    def failing(error: BaseException):
        def run() -> None:
            raise error

        return run

    cases = [
        script["Case"]("large", failing(torch.OutOfMemoryError("CUDA out of memory"))),
        script["Case"]("broken", failing(RuntimeError("no kernel\nmore"))),
        script["Case"]("good", lambda: {"passed": True}),
    ]
    too_long = [script["Case"]("slow", lambda: time.sleep(600)), script["Case"]("late", lambda: {"passed": True})]
    rows = script["run_part"]("part", cases, time.monotonic() + 600)
    rows += script["run_part"]("part", too_long, time.monotonic() + 2)
    assert rows == [
        {"case": "large", "note": "out of memory"},
        {"case": "broken", "passed": False, "note": "failed: RuntimeError: no kernel"},
        {"case": "good", "passed": True},
        {"case": "slow", "note": "stopped: the time was over"},
        {"case": "late", "note": "left out: the time was over"},
    ]
