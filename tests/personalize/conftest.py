from __future__ import annotations

import copy
import importlib.util
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageDraw

ROOT = Path(__file__).parents[2]
FREQUENT = 3000  # merges, of which all but few words of the tests are made
RARE = ("sks", "oue")  # tokens of subjects


def few_words(vocabulary: dict[str, int], merges: list[str]) -> tuple[dict[str, int], list[str]]:
    """The frequent ones among CLIP's words, and the rare ones that tests train: they split as in the whole vocabulary,
    which takes longer to read than a tiny model takes to train, as often as one is opened."""
    made_by = {merge.replace(" ", ""): merge for merge in merges}
    kept = set(merges[:FREQUENT])
    tokens = [f"{word}</w>" for word in RARE]
    while tokens:
        if merge := made_by.get(tokens.pop()):
            kept.add(merge)
            tokens += merge.split()
    kept_in_order = [merge for merge in merges if merge in kept]
    first, last = list(vocabulary)[: -len(merges) - 2], list(vocabulary)[-2:]
    few = [*first, *(merge.replace(" ", "") for merge in kept_in_order), *last]
    return {token: number for number, token in enumerate(few)}, kept_in_order


@pytest.fixture(scope="session")
def scripts() -> Iterator[None]:
    """Lets tests import what is in scripts/, whose tiny models know few words."""
    pytest.importorskip("diffusers")
    if importlib.util.find_spec("open_clip") is None:
        pytest.skip("needs CLIP's vocabulary: pip install --no-deps open_clip_torch")
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(ROOT / "scripts")
        import tiny_pipeline

        words = few_words(*tiny_pipeline.clip_vocabulary())
        patch.setattr(tiny_pipeline, "clip_vocabulary", lambda: words)
        yield


@pytest.fixture(scope="session")
def tiny_bases(tmp_path_factory, scripts) -> dict[str, Path]:
    """{kind: folder} of random pipelines."""
    from tiny_pipeline import make_pipeline

    folder = tmp_path_factory.mktemp("bases")
    kinds = ("sd", "sd2", "sdxl")
    for kind in kinds:
        make_pipeline(kind).save_pretrained(folder / kind)
    return {kind: folder / kind for kind in kinds}


@pytest.fixture(scope="session")
def tiny_judges(tmp_path_factory, scripts) -> dict[str, Path]:
    """{kind: folder} of a random CLIP, DINO and BLIP."""
    from tiny_judges import JUDGES, save_judge

    folder = tmp_path_factory.mktemp("judges")
    for kind in JUDGES:
        save_judge(kind, folder / kind, seed=1)  # with which no cosine of a picture and its text is negative
    return {kind: folder / kind for kind in JUDGES}


@pytest.fixture(scope="session")
def lose_vocabulary() -> Callable[[Path], None]:
    """Deletes the vocabularies in a folder, be they as transformers 5 writes them or as 4 does."""

    def lose(folder: Path) -> None:
        for name in ("tokenizer.json", "vocab.json", "vocab.txt"):
            for file in folder.rglob(name):
                file.unlink()

    return lose


@pytest.fixture(scope="session")
def fresh_base(tiny_bases):
    """A base of a kind, of which nothing is anyone else's but the tokenizers: to read them takes longer than the rest.
    Once they have learned a word they are read again."""
    from improved_diffusion.personalize.models.base import Base, load_base

    def words(loaded: Base) -> list[int]:
        return [len(tokenizer) for tokenizer in loaded.tokenizers]

    known: dict[str, tuple[Base, list[int]]] = {}

    def make(kind: str) -> Base:
        if kind not in known or words(known[kind][0]) != known[kind][1]:
            loaded = load_base(str(tiny_bases[kind]))
            known[kind] = loaded, words(loaded)
        loaded, _ = known[kind]
        shared = {id(tokenizer): tokenizer for tokenizer in loaded.tokenizers}
        return Base(loaded.name, copy.deepcopy(loaded.pipeline, shared))

    return make


@pytest.fixture(params=["sd", "sdxl"])
def base(request, fresh_base):
    """A fresh one of each kind."""
    return fresh_base(request.param)


@pytest.fixture(scope="session")
def photos(tmp_path_factory) -> Path:
    """A folder of five pictures of a red disc before backgrounds of their own, of several sizes; one has a caption."""
    folder = tmp_path_factory.mktemp("photos")
    generator = np.random.default_rng(0)
    for number, size in enumerate([(96, 64), (64, 96), (80, 80), (128, 96), (64, 64)]):
        colour = tuple(int(value) for value in generator.integers(0, 255, 3))
        picture = Image.new("RGB", size, colour)
        x, y = (generator.integers(8, side - 40) for side in size)
        ImageDraw.Draw(picture).ellipse([x, y, x + 32, y + 32], fill="red")
        picture.save(folder / f"{number}.png")
    (folder / "0.txt").write_text("a sks ball on a lawn")
    return folder


@pytest.fixture
def no_estimate(monkeypatch) -> None:
    """Training starts without the second that its estimate of GPU memory takes."""
    from improved_diffusion.personalize.training import start

    monkeypatch.setattr(start, "estimate_memory", lambda *_: "not estimated")
