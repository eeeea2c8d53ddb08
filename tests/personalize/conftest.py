from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def _tiny_pipeline():
    spec = importlib.util.spec_from_file_location("tiny_pipeline", ROOT / "scripts" / "tiny_pipeline.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def tiny_bases(tmp_path_factory) -> dict[str, Path]:
    """{kind: folder} of random pipelines with CLIP's own vocabulary."""
    pytest.importorskip("diffusers")
    if importlib.util.find_spec("open_clip") is None:
        pytest.skip("needs CLIP's vocabulary: pip install --no-deps open_clip_torch")
    folder = tmp_path_factory.mktemp("bases")
    for kind in ("sd", "sdxl"):
        _tiny_pipeline().make_pipeline(kind).save_pretrained(folder / kind)
    return {kind: folder / kind for kind in ("sd", "sdxl")}


@pytest.fixture(params=["sd", "sdxl"])
def base(request, tiny_bases):
    """A fresh one of each kind."""
    from improved_diffusion.personalize.models.base import load_base

    return load_base(str(tiny_bases[request.param]))
