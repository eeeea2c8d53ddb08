from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="session")
def scripts() -> Iterator[None]:
    """Lets tests import what is in scripts/."""
    pytest.importorskip("diffusers")
    if importlib.util.find_spec("open_clip") is None:
        pytest.skip("needs CLIP's vocabulary: pip install --no-deps open_clip_torch")
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(ROOT / "scripts")
        yield


@pytest.fixture(scope="session")
def tiny_bases(tmp_path_factory, scripts) -> dict[str, Path]:
    """{kind: folder} of random pipelines with CLIP's own vocabulary."""
    from tiny_pipeline import make_pipeline

    folder = tmp_path_factory.mktemp("bases")
    for kind in ("sd", "sdxl"):
        make_pipeline(kind).save_pretrained(folder / kind)
    return {kind: folder / kind for kind in ("sd", "sdxl")}


@pytest.fixture(scope="session")
def tiny_judges(tmp_path_factory, scripts) -> dict[str, Path]:
    """{kind: folder} of a random CLIP, DINO and BLIP."""
    from tiny_judges import JUDGES, save_judge

    folder = tmp_path_factory.mktemp("judges")
    for kind in JUDGES:
        save_judge(kind, folder / kind)
    return {kind: folder / kind for kind in JUDGES}


@pytest.fixture(params=["sd", "sdxl"])
def base(request, tiny_bases):
    """A fresh one of each kind."""
    from improved_diffusion.personalize.models.base import load_base

    return load_base(str(tiny_bases[request.param]))
