"""Imports go down only (the floors are in pyproject.toml); command lines answer at once."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

PROJECT = Path(__file__).parent.parent


def test_imports_go_down_only():
    linter = Path(sys.executable).with_name("lint-imports")
    done = subprocess.run([linter, "--no-cache"], cwd=PROJECT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


MODULES = ("improved_diffusion.data", "improved_diffusion.models.openai", "improved_diffusion.sampling.export")
ASK_FOR_HELP = """
import contextlib, io, runpy, sys
for command in sys.argv[1:]:
    sys.argv[1:], shown = ["--help"], io.StringIO()
    sys.path[0] = command.rpartition("/")[0]
    run = runpy.run_path if command.endswith(".py") else runpy.run_module
    with contextlib.suppress(SystemExit), contextlib.redirect_stdout(shown):
        run(command, run_name="__main__")
    assert "usage:" in shown.getvalue(), command
    assert "torch" not in sys.modules, command
"""


def test_help_does_not_wait_for_torch():
    """One process asks all commands in turn: what one of them has imported is there for the others."""
    files = [file for file in (*PROJECT.glob("*.py"), *PROJECT.glob("scripts/*.py")) if "__main__" in file.read_text()]
    assert len(files) > 8
    done = subprocess.run(
        [sys.executable, "-c", ASK_FOR_HELP, *sorted(map(str, files)), *MODULES],
        cwd=PROJECT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
