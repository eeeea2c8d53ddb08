"""Rare tokens: which word can stand for a new subject (Ruiz et al. 2022, DreamBooth, arXiv:2208.12242, section 3.1).

A good one is a single token, so that one embedding carries the subject, and rare, so that it has no strong meaning to
unlearn. CLIP's byte-pair merges are in order of frequency: the later a token was merged, the rarer it was.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from improved_diffusion.errors import UserError

# Later merges than this are taken as rare: `sks`, DreamBooth's token, is 48136 of 49408; `http` is 15066.
RARE_FROM = 40_000
LENGTHS = (3, 4)  # letters of a suggestion: shorter ones are abbreviations, longer ones words


@dataclass(frozen=True)
class TokenReport:
    """How a candidate fares in one tokenizer."""

    candidate: str
    pieces: tuple[str, ...]
    rank: int  # of the most frequent piece; the higher, the rarer
    vocabulary: int
    warnings: tuple[str, ...]

    @property
    def is_single(self) -> bool:
        return len(self.pieces) == 1


def inspect_token(candidate: str, tokenizer: Any) -> TokenReport:
    """How `candidate` splits, how rare it is, and what speaks against it.

    Raises:
        UserError: an empty candidate.
    """
    if not candidate.strip():
        raise UserError("an empty token cannot stand for a subject")
    ids = tokenizer(candidate).input_ids[1:-1]  # without start and end
    pieces = tuple(tokenizer.convert_ids_to_tokens(ids))
    vocabulary = len(tokenizer)
    warnings = []
    if len(pieces) > 1:
        warnings.append(f"splits into {len(pieces)} tokens: {' '.join(pieces)}")
    if min(ids) < RARE_FROM:
        warnings.append(f"common (rank {min(ids):,} of {vocabulary:,}): it brings a meaning of its own")
    if candidate != candidate.lower():
        warnings.append(f"the tokenizer lower-cases it: the same as {candidate.lower()!r}")
    return TokenReport(candidate, pieces, min(ids), vocabulary, tuple(warnings))


def require_single_token(candidate: str, tokenizers: Sequence[Any]) -> None:
    """Raise UserError where a tokenizer splits `candidate`; the message suggests others."""
    for tokenizer in tokenizers:
        report = inspect_token(candidate, tokenizer)
        if not report.is_single:
            others = ", ".join(report.candidate for report in suggest_tokens(tokenizer, 5))
            raise UserError(
                f"the token {candidate!r} splits into {' '.join(report.pieces)}, so no one embedding would carry the "
                f"subject: use a single rare one, {others} say (personalize.py tokens tells more), or take it all the "
                "same, subject.allow_split_token true"
            )


def require_new_word(candidate: str, tokenizers: Sequence[Any]) -> None:
    """Raise UserError where a tokenizer knows `candidate` as one token, so that it cannot become another."""
    if any(inspect_token(candidate, tokenizer).is_single for tokenizer in tokenizers):
        raise UserError(
            f"the tokenizer knows {candidate!r} already: textual inversion needs a new word, <{candidate}> say"
        )


def suggest_tokens(tokenizer: Any, count: int = 10) -> list[TokenReport]:
    """The rarest single tokens of three or four letters that survive a round trip through the tokenizer."""
    by_rank = sorted(tokenizer.get_vocab().items(), key=lambda item: -item[1])
    word = re.compile(rf"[a-z]{{{LENGTHS[0]},{LENGTHS[1]}}}</w>")
    reports = []
    for token, rank in by_rank:
        if rank < RARE_FROM or len(reports) == count:
            break
        if not word.fullmatch(token):
            continue
        report = inspect_token(token.removesuffix("</w>"), tokenizer)
        if report.is_single and report.rank == rank:
            reports.append(report)
    return reports


def token_table(reports: Sequence[TokenReport]) -> str:
    """One line for each candidate."""
    width = max(len(report.candidate) for report in reports)
    lines = [f"{'token':{max(width, 5)}}  {'pieces':>6}  {'rank':>6}"]
    for report in reports:
        remark = "; ".join(report.warnings) or "a single rare token"
        lines.append(f"{report.candidate:{max(width, 5)}}  {len(report.pieces):6}  {report.rank:6}  {remark}")
    return "\n".join(lines)
