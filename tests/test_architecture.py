"""Imports go down only (the floors are in pyproject.toml); command lines answer at once."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

PROJECT = Path(__file__).parent.parent


def test_imports_go_down_only():
    linter = Path(sys.executable).with_name("lint-imports")
    done = subprocess.run([linter, "--no-cache"], cwd=PROJECT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


COMMANDS = [
    *(file.name for file in PROJECT.glob("*.py") if file.name != "setup.py"),
    *(f"scripts/{file.name}" for file in PROJECT.glob("scripts/*.py")),
    *("-m improved_diffusion.data", "-m improved_diffusion.models.openai", "-m improved_diffusion.sampling.export"),
]


@pytest.mark.parametrize("script", sorted(COMMANDS))
def test_help_does_not_wait_for_torch(script):
    command = [sys.executable, "-X", "importtime", *script.split(), "--help"]
    done = subprocess.run(command, cwd=PROJECT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "usage:" in done.stdout
    imported = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}
    assert "argparse" in imported
    assert "torch" not in imported
