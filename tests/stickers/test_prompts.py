"""Which prompts tell good pictures from bad ones: the ranking by made scores, the command by a tiny CLIP."""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from improved_diffusion.stickers.prompts import scoring
from improved_diffusion.stickers.prompts.ranking import rank
from improved_diffusion.stickers.prompts.templates import shipped_prompts

SETS = ("painted", "good", "bad", "trash")
BEST, WORST = "a telegram sticker", "a painted beautiful pretty sticker on monotonous black background"
PUBLISHED = {"CLIP score": [(27.80, 27.66, 25.27, 17.87), (18.11, 21.60, 19.01, 21.01)]}  # means of SETS, for both


def pictures_around(means: np.ndarray, n: int, spread: float = 1.0) -> np.ndarray:
    """(n, P) scores of exactly these means; what a picture adds to one prompt it adds to all."""
    own = np.random.default_rng(0).normal(size=(n, 1))
    return spread * (own - own.mean()) / own.std(ddof=1) + means


def scores_of(published) -> dict[str, list[np.ndarray]]:
    return {
        scorer: [pictures_around(np.array(means), 40) for means in zip(*rows, strict=True)]
        for scorer, rows in published.items()
    }


def test_the_published_prompts_come_in_the_published_order():
    assert {BEST, WORST} <= set(shipped_prompts())
    first, last = rank([WORST, BEST], scores_of({k: v[::-1] for k, v in PUBLISHED.items()}))
    assert (first.prompt, first.in_order, last.prompt) == (BEST, 3, WORST)
    assert first.margins["CLIP score"][:, 0] == pytest.approx([0.14, 2.39, 7.40])


def test_there_are_200_prompts():
    assert len(set(shipped_prompts())) == 200


def test_equal_orders_are_told_apart_by_their_spread():
    near, far = (4, 3, 2, 1), (8, 6, 4, 2)
    ranked = rank(["near", "far"], scores_of({"CLIP score": [near, far]}))
    assert [r.prompt for r in ranked] == ["far", "near"]
    assert ranked[0].spread[0] == pytest.approx(6)
    assert ranked[0].behind == pytest.approx([0, 0, 0])


def test_what_pictures_share_cancels_between_prompts():
    """Pictures differ by 5 and the prompts by 0.5 on each: margins are unsure, their difference is not."""
    means = np.array([0.0, 0.5])
    sets = [pictures_around(2 * means, 30, 5.0), pictures_around(means, 30, 5.0)]
    first, second = rank(["a", "b"], {"CLIP score": sets})
    assert first.prompt == "b"
    assert (second.behind[1] > 0.01, first.margins["CLIP score"][0, 1] < 0) == (True, True)
    assert second.behind[2] - second.behind[1] < 1e-6


def test_an_interval_is_that_of_means():
    rng = np.random.default_rng(1)
    sets = [rng.normal(0, 3, (50, 1)), rng.normal(0, 4, (80, 1))]
    ((value, low, high),) = rank(["a"], {"CLIP score": sets})[0].margins["CLIP score"]
    error = np.sqrt(sets[0].var(ddof=1) / 50 + sets[1].var(ddof=1) / 80)
    assert value == pytest.approx(sets[0].mean() - sets[1].mean())
    assert [value - low, high - value] == pytest.approx([1.96 * error] * 2, rel=0.1)


@pytest.fixture
def folders(tmp_path):
    rng = np.random.default_rng(0)
    for number, name in enumerate(SETS):
        (tmp_path / name).mkdir()
        for i in range(3):
            pixels = rng.integers(0, 60 * (number + 1), (32, 32, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / name / f"{i}.png")
    return [tmp_path / name for name in SETS]


def table(file: Path) -> list[dict[str, str | float]]:
    """The rows of a CSV file, numbers as such."""
    return [
        {name: value if name == "prompt" else float(value) for name, value in row.items()}
        for row in csv.DictReader(file.open())
    ]


def test_a_search_goes_on_where_it_was_killed(folders, tiny_judges, run_script, tmp_path, monkeypatch):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a sticker\n\na cat\n")
    command = ("prompts", *folders, f"--clip={tiny_judges['clip']}", f"--pick={tiny_judges['clip']}")
    command += (f"--prompts={prompts}", f"--out={tmp_path / 'out'}")
    outcome = run_script("stickers.py", *command)
    assert outcome.code == 0, outcome.err
    before = table(tmp_path / "out" / "prompts.csv")
    assert sorted(row["prompt"] for row in before) == ["a cat", "a sticker"]
    assert (tmp_path / "out" / "prompts.png").stat().st_size > 1000

    scored = []

    def count(images, model, processor):
        scored.append(len(images))
        return embed(images, model, processor)

    embed = scoring.image_embeddings
    monkeypatch.setattr(scoring, "image_embeddings", count)
    files = sorted((tmp_path / "out" / "scores").rglob("*.json"))
    files[0].unlink()
    files[1].write_text("{")
    assert run_script("stickers.py", *command).code == 0
    assert scored == [2]
    for now, then in zip(table(tmp_path / "out" / "prompts.csv"), before, strict=True):
        assert now == pytest.approx(then, abs=1e-3), "as far as scores do not depend on what they are computed beside"
    prompts.write_text("a cat\na dog\n")
    assert run_script("stickers.py", *command, "--pick=none").code == 0
    assert scored == [2, 12], "a prompt that is new is scored on all pictures"


@pytest.mark.parametrize(
    ("sets", "problem"),
    [
        (["painted"], "takes two sets of pictures at least"),
        (["painted", "painted"], "two sets are called painted"),
        (["painted", "single"], "single has one picture"),
        (["painted", "missing"], "there is no folder"),
    ],
)
def test_sets_that_cannot_be_compared_are_refused(sets, problem, folders, run_script, tmp_path):
    (tmp_path / "single").mkdir()
    Image.new("RGB", (8, 8)).save(tmp_path / "single" / "a.png")
    outcome = run_script("stickers.py", "prompts", *(tmp_path / name for name in sets), "--out=out")
    assert outcome.is_one_clear_line()
    assert problem in outcome.err
