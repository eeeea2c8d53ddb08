"""Features of generated images are kept under a hash of all that decides the images, the code included."""

from __future__ import annotations

import shutil
from pathlib import Path

import grimp
import numpy as np
import pytest

from improved_diffusion.errors import UserError
from improved_diffusion.metrics.images.sources import ArraySource
from improved_diffusion.sampling import run_source
from improved_diffusion.sampling.generate import SampleKey
from improved_diffusion.sampling.loading import load
from improved_diffusion.sampling.run_source import GENERATING_CODE, RunSource, generating_code_hash

PACKAGE = Path(run_source.__file__).parent.parent
DECIDES_NO_IMAGE = {
    *("improved_diffusion", "cache", "checkpoint_file", "errors", "files", "progress", "provenance", "run_directory"),
    *("sampling.series", "settings"),
}


@pytest.fixture
def copied_code(tmp_path, monkeypatch):
    """A copy of the package, of which the hash is taken."""
    shutil.copytree(PACKAGE, tmp_path / "package", ignore=shutil.ignore_patterns("__pycache__", "personalize"))
    monkeypatch.setattr(run_source, "__file__", str(tmp_path / "package" / "sampling" / "run_source.py"))
    generating_code_hash.cache_clear()
    yield tmp_path / "package"
    generating_code_hash.cache_clear()


def content_hash(run: Path) -> str:
    generating_code_hash.cache_clear()
    model = load(run, device="cpu")
    return RunSource(model, model.config.sampling, [SampleKey(1, 0, 0), SampleKey(1, 1, 0)]).content_hash


@pytest.mark.parametrize(
    "name", ["diffusion/samplers.py", "models/group_norm.c", "models/unet.py", "sampling/generate.py"]
)
def test_another_sampler_gives_other_features(tiny_run, copied_code, name):
    before = content_hash(tiny_run)
    assert content_hash(tiny_run) == before
    with (copied_code / name).open("a") as file:
        file.write("\nETA = 0.5\n")
    assert content_hash(tiny_run) != before


def test_code_that_decides_no_image_does_not_count(tiny_run, copied_code):
    before = content_hash(tiny_run)
    with (copied_code / "metrics" / "report.py").open("a") as file:
        file.write("\nDIGITS = 4\n")
    assert content_hash(tiny_run) == before


def test_whatever_generating_imports_is_hashed():
    hashed = [name.removesuffix(".py").replace("/", ".") for name in GENERATING_CODE]
    imports = grimp.build_graph("improved_diffusion", exclude_type_checking_imports=True)
    for module in imports.find_upstream_modules("improved_diffusion.sampling.loading"):
        name = module.removeprefix("improved_diffusion.")
        assert name in DECIDES_NO_IMAGE or any(f"{name}.".startswith(f"{part}.") for part in hashed), module


@pytest.mark.parametrize("names", [("creme_brulee", "waffles"), ("waffles", "apple_pie", "creme_brulee")])
def test_as_many_of_each_class_as_the_reference_has_whatever_their_order(tiny_run, names):
    """And none of a class that it lacks."""
    model = load(tiny_run, device="cpu")
    labels = np.repeat(np.arange(len(names)), [1 + i for i in range(len(names))])
    reference = ArraySource("real", np.zeros((len(labels), 16, 16, 3), np.uint8), labels, names)
    drawn = run_source.run_source(model, reference, model.config.sampling)
    counts = dict(zip(model.class_names, np.bincount(drawn.labels, minlength=3).tolist(), strict=True))
    assert counts == {name: 0 for name in model.class_names} | {name: 1 + i for i, name in enumerate(names)}


@pytest.mark.parametrize("names", [None, ("a", "b")])
def test_classes_that_are_not_the_models_are_refused(tiny_run, names):
    model = load(tiny_run, device="cpu")
    reference = ArraySource("real", np.zeros((4, 16, 16, 3), np.uint8), np.array([0, 0, 0, 1]), names)
    with pytest.raises(UserError, match="say how many images to generate of each class with --per-class"):
        run_source.run_source(model, reference, model.config.sampling)
