"""What several floors' tests need: tiny image sets, and command lines run in this process."""

from __future__ import annotations

import os
import runpy
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

os.environ["CUDA_VISIBLE_DEVICES"] = ""  # what is tested is the arithmetic of the CPU, bit for bit
PROJECT = Path(__file__).parent.parent
torch.set_num_threads(1)


@dataclass(frozen=True)
class Outcome:
    """What a command line did."""

    code: int
    out: str
    err: str

    def is_one_clear_line(self) -> bool:
        """Whether it exited as a user's mistake should: status 2, one line that starts with `error:`, no traceback."""
        lines = [line for line in self.err.splitlines() if line.strip()]
        return self.code == 2 and len(lines) == 1 and lines[0].startswith("error: ")


@pytest.fixture
def run_script(monkeypatch, capfd) -> Callable[..., Outcome]:
    """Run a script of the project's root, in this process, as `python SCRIPT ARGUMENTS` would."""

    def run(script: str, *arguments: object) -> Outcome:
        monkeypatch.setattr(sys, "argv", [script, *map(str, arguments)])
        capfd.readouterr()
        code = 0
        try:
            runpy.run_path(str(PROJECT / script), run_name="__main__")
        except SystemExit as stop:
            code = stop.code or 0
        return Outcome(code, *capfd.readouterr())

    return run


@pytest.fixture(scope="session")
def tiny_set(tmp_path_factory) -> Path:
    """A packed set of 36 images, 16x16, of 3 classes, with a test split inside it: blobs of a class's colour."""
    from improved_diffusion.data.packing import pack
    from improved_diffusion.data.sources import folder_source

    root = tmp_path_factory.mktemp("tiny")
    generator = np.random.default_rng(0)
    for split in ("train", "test"):
        for label, name in enumerate(("apple_pie", "creme_brulee", "waffles")):
            folder = root / "files" / split / name
            folder.mkdir(parents=True)
            for number in range(12):
                image = generator.integers(0, 80, (16, 16, 3), dtype=np.uint8)
                top, left = generator.integers(0, 8, 2)
                image[top : top + 8, left : left + 8, label] = 220
                Image.fromarray(image).save(folder / f"{number}.png")
    pack(folder_source(root / "files"), root / "set", 16, workers=1)
    return root / "set"
