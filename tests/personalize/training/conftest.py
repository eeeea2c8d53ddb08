from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

SUBJECT = ("--subject.token=sks", "--subject.class_name=ball")
FAST = (
    *("--watch.clip=null", "--watch.vision=null", "--watch.steps=2", "--watch.every=100", "--watch.share=1"),
    "--watch.seeds=[0]",
    *('--watch.prompts=["a {token} {class}"]', '--watch.class_prompts=["a {class}"]'),
)


@pytest.fixture
def train_arguments(photos, tmp_path, monkeypatch) -> Callable[..., list[str]]:
    """The command line that trains on the photos, with little to look at; the run's directory is `tmp_path / name`."""
    monkeypatch.setenv("IMPROVED_DIFFUSION_CACHE", str(tmp_path / "cache"))

    def make(base: Path, name: str, *flags: str, steps: int = 2) -> list[str]:
        where = (f"--base={base}", f"--data={photos}", f"--out={tmp_path / name}")
        return ["personalize.py", "train", *where, *SUBJECT, *FAST, f"--training.steps={steps}", *flags]

    return make


@pytest.fixture
def forget_accelerator() -> Callable[[], None]:
    """Before each training in this process: accelerate knows of one a process, and here there are several."""
    from accelerate.state import AcceleratorState

    return lambda: AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture
def train(run_script, train_arguments, forget_accelerator):
    """Train as `train_arguments` says, in this process."""

    def run(*arguments, **how):
        forget_accelerator()
        return run_script(*train_arguments(*arguments, **how))

    return run


@pytest.fixture
def resume(run_script, tmp_path, forget_accelerator):
    """Go on with the run `tmp_path / name`."""

    def run(name: str, *flags: str):
        forget_accelerator()
        return run_script("personalize.py", "train", f"--resume={tmp_path / name}", *flags)

    return run
