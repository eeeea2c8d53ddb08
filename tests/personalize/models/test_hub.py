"""Models of the hub: where it does not answer, and where the cache has them."""

from __future__ import annotations

import shutil
import socket
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from improved_diffusion.errors import UserError

pytest.importorskip("diffusers")
from huggingface_hub import constants  # noqa: E402

from improved_diffusion.personalize.models import hub  # noqa: E402
from improved_diffusion.personalize.models.base import load_base, load_tokenizer  # noqa: E402
from improved_diffusion.personalize.models.judges import load_blip, load_clip, load_vision  # noqa: E402

LOADERS = [
    pytest.param(load_base, "sd", "--base", id="base"),
    pytest.param(load_tokenizer, "sd", "--base", id="tokenizer"),
    pytest.param(load_clip, "clip", "--watch.clip", id="clip"),
    pytest.param(load_vision, "dino", "--watch.vision", id="dino"),
    pytest.param(load_blip, "blip", "--model", id="blip"),
]


@pytest.fixture(autouse=True)
def silent_hub(monkeypatch, tmp_path) -> Iterator[None]:
    """A hub that takes connections and never answers, as behind some firewalls, and an empty cache."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{server.getsockname()[1]}")
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        # transformers 4 has a copy of its own.
        monkeypatch.setattr("transformers.utils.hub.TRANSFORMERS_CACHE", str(tmp_path / "cache"), raising=False)
        monkeypatch.setattr(hub, "TIMEOUT_SECONDS", 0.3)
        yield


def put_in_cache(folder: Path, name: str) -> Path:
    """As `hf download` would."""
    repository = Path(constants.HF_HUB_CACHE) / f"models--{name.replace('/', '--')}"
    commit = "0123456789" * 4
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(commit)
    return shutil.copytree(folder, repository / "snapshots" / commit)


@pytest.mark.parametrize(("load", "kind", "setting"), LOADERS)
def test_a_hub_that_does_not_answer_is_not_waited_for(load, kind, setting):
    start = time.monotonic()
    with pytest.raises(UserError, match=rf"hf download nobody/nothing --local-dir DIR.* give {setting} DIR") as caught:
        load("nobody/nothing")
    assert time.monotonic() - start < 8  # transformers alone takes minutes, diffusers waits for ever
    assert "timed out" in str(caught.value)


@pytest.mark.parametrize(("load", "kind", "setting"), LOADERS)
def test_what_is_in_the_cache_needs_no_network(load, kind, setting, tiny_bases, tiny_judges, lose_vocabulary):
    snapshot = put_in_cache({**tiny_bases, **tiny_judges}[kind], "nobody/something")
    start = time.monotonic()
    load("nobody/something")
    assert time.monotonic() - start < 8
    lose_vocabulary(snapshot)  # a download cut short
    for file in snapshot.glob("*.safetensors"):
        file.unlink()
    with pytest.raises(UserError, match="neither in the cache"):
        load("nobody/something")


@pytest.mark.parametrize("part", ["unet", "text_encoder"])
def test_a_base_without_its_weights(part, tiny_bases, tmp_path):
    shutil.copytree(tiny_bases["sd"], tmp_path / "base")
    for file in (tmp_path / "base" / part).glob("*.safetensors"):
        file.unlink()
    message = rf"there are no weights \(.safetensors\) in {tmp_path}/base/{part}; copy or download it again"
    with pytest.raises(UserError, match=message):
        load_base(str(tmp_path / "base"))


@pytest.mark.parametrize("load", [load_base, load_clip])
@pytest.mark.parametrize(
    ("name", "problem"), [("missing", "does not exist"), ("empty", "is no folder of one: it has no")]
)
def test_a_folder_that_is_none_is_not_looked_for_on_the_hub(load, name, problem, tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=problem):
        load(str(tmp_path / name))
