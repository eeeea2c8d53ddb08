"""Which prompt draws best: fewer prompts and more pictures each round."""

from __future__ import annotations

import csv

import numpy as np
import pytest

from improved_diffusion.stickers.prompts.halving import ROUNDS, compare, halve

QUALITY = {f"prompt {i}": float(i) for i in range(200)}


def test_each_round_goes_on_with_the_best():
    asked = []

    def score(prompts, seeds):
        asked.append((len(prompts), seeds))
        noise = np.random.default_rng(0).normal(size=seeds)  # of a seed, the same for each prompt
        return {"CLIP score": np.array([[QUALITY[prompt]] for prompt in prompts]) + noise}

    standings = halve(list(QUALITY), score)
    assert asked == list(ROUNDS)
    assert [s.prompt for s in standings] == [f"prompt {i}" for i in reversed(range(200))]
    assert [standings[i].pictures for i in (0, 11, 12, 49, 50, 199)] == [16, 16, 4, 4, 2, 2]


def test_few_prompts_are_all_drawn_to_the_end():
    def score(prompts, seeds):
        return {"CLIP score": np.full((len(prompts), seeds), 1.0)}

    assert [s.pictures for s in halve(["a", "b"], score)] == [16, 16]


def test_pictures_of_one_seed_are_compared():
    """Seeds differ by 5, prompts by 0.5 on each seed."""
    seeds = np.random.default_rng(0).normal(0, 5, 16)
    first, second = compare(["a", "b"], {"CLIP score": np.stack([seeds, seeds + 0.5])})
    assert first.prompt == "b"
    assert 0 < second.behind.low <= second.behind.mean <= second.behind.high
    assert second.behind.high - second.behind.low < 1e-6
    assert second.means == {"CLIP score": pytest.approx(seeds.mean())}


def test_the_command_draws_what_is_missing(tiny_base, tiny_judges, run_script, tmp_path):
    prompts, out = tmp_path / "prompts.txt", tmp_path / "out"
    prompts.write_text("a cat\na dog\n")
    command = ("prompts", f"--base={tiny_base}", "--steps=1", f"--prompts={prompts}", f"--out={out}")
    command += (f"--clip={tiny_judges['clip']}", "--pick=none")
    outcome = run_script("stickers.py", *command)
    assert outcome.code == 0, outcome.err
    pictures = sorted((out / "pictures").rglob("*.png"))
    assert len(pictures) == 32
    rows = list(csv.DictReader((out / "prompts.csv").open()))
    assert sorted(row["prompt"] for row in rows) == ["a cat", "a dog"]
    before = {file: file.stat().st_mtime_ns for file in pictures[1:]}
    whole = pictures[0].read_bytes()
    pictures[0].unlink()
    assert run_script("stickers.py", *command).code == 0
    assert pictures[0].read_bytes() == whole
    assert {file: file.stat().st_mtime_ns for file in pictures[1:]} == before
    assert list(csv.DictReader((out / "prompts.csv").open())) == rows
    outcome = run_script("stickers.py", *command, "--steps=2")
    assert "drawn with steps 1, not 2: choose another --out" in outcome.err


@pytest.mark.parametrize("flags", [(), ("painted", "--base=x")])
def test_it_is_sets_or_a_model(flags, run_script):
    outcome = run_script("stickers.py", "prompts", *flags, "--out=x")
    assert outcome.is_one_clear_line()
    assert "give sets of pictures to tell apart, or --run or --base" in outcome.err
