from __future__ import annotations

import runpy
import shutil
from pathlib import Path

import pytest

from improved_diffusion.errors import UserError
from improved_diffusion.personalize.models.tokens import (
    inspect_token,
    require_new_word,
    require_single_token,
    suggest_tokens,
    token_table,
)

SCRIPT = Path(__file__).parents[3] / "scripts" / "tiny_pipeline.py"


@pytest.fixture(scope="module")
def tokenizer(scripts):
    """With the whole of CLIP's vocabulary."""
    return runpy.run_path(str(SCRIPT))["make_tokenizer"]("<|endoftext|>")


@pytest.mark.parametrize(("token", "rank"), [("sks", 48136), ("hta", 49384), ("oue", 48838), ("ohwx", 47993)])
def test_the_published_rare_tokens_are_single_and_rare(tokenizer, token, rank):
    report = inspect_token(token, tokenizer)
    assert (report.is_single, report.rank, report.warnings) == (True, rank, ())


def test_what_speaks_against_a_token(tokenizer):
    common = inspect_token("http", tokenizer)
    assert (common.is_single, common.rank) == (True, 15066)
    assert "common" in common.warnings[0]
    split = inspect_token("zwx", tokenizer)
    assert split.pieces == ("z", "wx</w>")
    assert "splits into 2 tokens: z wx</w>" in split.warnings[0]
    assert "lower-cases it: the same as 'tok'" in inspect_token("TOK", tokenizer).warnings[-1]
    with pytest.raises(UserError, match="empty token"):
        inspect_token("  ", tokenizer)


def test_suggestions_are_single_rare_and_sorted(tokenizer):
    reports = suggest_tokens(tokenizer, 20)
    assert len(reports) == 20
    assert all(report.is_single and not report.warnings for report in reports)
    ranks = [report.rank for report in reports]
    assert ranks == sorted(ranks, reverse=True)
    assert all(
        tokenizer.decode([rank]).strip() == report.candidate for rank, report in zip(ranks, reports, strict=True)
    )


def test_a_token_that_splits_is_refused_with_others(tokenizer):
    require_single_token("sks", [tokenizer, tokenizer])
    with pytest.raises(UserError, match=r"'zwx' splits into z wx</w>.*use a single rare one, \w+, \w+"):
        require_single_token("zwx", [tokenizer])


def test_a_word_that_is_known_is_no_new_one(tokenizer):
    require_new_word("<sks>", [tokenizer])
    with pytest.raises(UserError, match="knows 'sks' already"):
        require_new_word("sks", [tokenizer])


def test_the_table_has_a_line_for_each(tokenizer):
    table = token_table([inspect_token(token, tokenizer) for token in ("sks", "http")])
    assert [line.split()[:3] for line in table.splitlines()] == [
        ["token", "pieces", "rank"],
        ["sks", "1", "48136"],
        ["http", "1", "15066"],
    ]


def test_the_command_line(run_script, tiny_bases, tokenizer, tmp_path):
    base = shutil.copytree(tiny_bases["sdxl"], tmp_path / "base")
    tokenizer.save_pretrained(base / "tokenizer")
    outcome = run_script("personalize.py", "tokens", "--base", base, "sks", "zwx")
    assert outcome.code == 0, outcome.err
    assert [line.split()[0] for line in outcome.out.splitlines()] == ["token", "sks", "zwx"]
    outcome = run_script("personalize.py", "tokens", "--base", base, "--count", 3)
    assert len(outcome.out.splitlines()) == 4
    (tmp_path / "empty").mkdir()
    for arguments, message in [
        (("tokens", "--base", tmp_path / "empty"), "model_index.json"),
        (("tokens",), "--base"),
        (("token",), "tokens"),
    ]:
        outcome = run_script("personalize.py", *arguments)
        assert (outcome.code, outcome.err.count("\n")) == (2, 1)
        assert message in outcome.err
