"""Pictures of the same prompts and seeds, drawn in another way, quantized for one: how far from the reference?"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from improved_diffusion.errors import UserError
from improved_diffusion.metrics.estimate import Score, mean_score
from improved_diffusion.metrics.pairs import lpips
from improved_diffusion.metrics.similarity import rgb_arrays
from improved_diffusion.personalize.data.captioned import load_image

ANOTHER_SEED = "another seed"


class Drawn(NamedTuple):
    """A picture of `generate`."""

    text: str
    seed: int
    file: Path


@dataclass(frozen=True)
class Comparison:
    """How far the pictures of a folder are from those of the reference."""

    name: str
    equal: int
    difference: Score
    """Mean absolute difference of a pixel, in grey levels of 255."""
    lpips: Score | None


def read_drawn(folder: Path) -> list[Drawn]:
    """The pictures of a folder of `generate`.

    Raises:
        UserError: it is none.
    """
    try:
        records = [json.loads(line) for line in (folder / "metadata.jsonl").read_text().splitlines()]
        return [Drawn(record["text"], record["seed"], folder / record["file_name"]) for record in records]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{folder} is no finished folder of `personalize.py generate`: {error}") from error


def compare(reference: Path, folders: Sequence[Path], network: nn.Module | None = None) -> list[Comparison]:
    """Each folder against the reference, picture by picture. Last, as a scale for the others, the reference against
    itself with the next seed of each prompt, where it has several.

    Args:
        reference, folders: of `generate`, with the same prompts and seeds.
        network: of LPIPS, or None.

    Raises:
        UserError: a folder of other prompts, seeds or sizes, or of no `generate`.
    """
    expected = read_drawn(reference)
    pictures = [load_image(drawn.file) for drawn in expected]
    found = []
    for folder in folders:
        drawn = read_drawn(folder)
        if [(one.text, one.seed) for one in drawn] != [(one.text, one.seed) for one in expected]:
            raise UserError(f"{folder} has other prompts or seeds than {reference}: draw both with the same flags")
        found.append(_compare(str(folder), [load_image(one.file) for one in drawn], pictures, network))
    indices = range(len(expected))
    of_prompt = {one.text: [i for i in indices if expected[i].text == one.text] for one in expected}
    pairs = [pair for of_one in of_prompt.values() for pair in zip(of_one, of_one[1:], strict=False)]
    if pairs:
        ones, others = ([pictures[i] for i in side] for side in zip(*pairs, strict=True))
        found.append(_compare(ANOTHER_SEED, others, ones, network))
    return found


def _compare(
    name: str, pictures: list[Image.Image], references: list[Image.Image], network: nn.Module | None
) -> Comparison:
    for picture, reference in zip(pictures, references, strict=True):
        if picture.size != reference.size:
            raise UserError(f"a picture of {name} is {picture.size}, and its reference {reference.size}")
    pairs = zip(rgb_arrays(pictures), rgb_arrays(references), strict=True)
    differences = Tensor([np.abs(one.astype(np.int16) - other).mean() for one, other in pairs])
    distance = None if network is None else mean_score(lpips(pictures, references, network))
    return Comparison(name, int(torch.sum(differences == 0)), mean_score(differences), distance)


def comparison_table(reference: Path, found: Sequence[Comparison]) -> str:
    """One line for each."""
    width = max(len(name) for name in (str(reference), *(one.name for one in found)))
    lines = [f"{str(reference):{width}}  {'n':>5} {'equal':>6}  {'grey levels':>24}  {'LPIPS':>22}"]
    for one in found:
        distance = "-" if one.lpips is None else _amount(one.lpips, 4)
        lines.append(
            f"{one.name:{width}}  {one.difference.n:5} {one.equal:6}  {_amount(one.difference, 3):>24}  {distance:>22}"
        )
    return "\n".join(lines)


def _amount(score: Score, digits: int) -> str:
    interval = "" if score.low is None else f" ({score.low:.{digits}f} to {score.high:.{digits}f})"
    return f"{score.mean:.{digits}f}{interval}"
