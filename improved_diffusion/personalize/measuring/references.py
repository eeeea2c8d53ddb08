"""The images that the subject was learned from, as pictures are compared with them, and all scores of a picture."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from PIL import Image
from torch import Tensor

from improved_diffusion.personalize.data.captioned import CaptionedImage
from improved_diffusion.personalize.data.crops import fit
from improved_diffusion.personalize.measuring.judge import Judge, Seen, scores_of
from improved_diffusion.personalize.models.base import Base
from improved_diffusion.personalize.models.encoding import rendered
from improved_diffusion.progress import progress


@dataclass(frozen=True)
class References:
    """The training images, and what copies of them would be."""

    real: Seen
    copies: Seen  # as the autoencoder renders them: a copy is no sharper


def see_training(
    base: Base, judge: Judge, images: Sequence[CaptionedImage], background: str, resolution: int
) -> References:
    """Squares of the training images, `resolution` pixels a side, before and after the autoencoder of `base`."""

    def squares() -> Iterator[Image.Image]:
        with progress(total=len(images), desc="looking at the training images", unit="image", leave=False) as bar:
            for image in images:
                yield fit(image.load(background), (resolution, resolution))[0]
                bar.update()

    if not judge.compares:
        return References(Seen(), Seen())
    return References(judge.see(squares()), judge.see(rendered(base, square) for square in squares()))


def score_pictures(seen: Seen, texts: Tensor | None, references: References) -> dict[str, Tensor]:
    """{score: one value for each of N pictures, (N,)}; see `scores_of`.

    Args:
        seen: the pictures.
        texts: CLIP's embeddings of their prompts, (N, d).
        references: the training images.
    """
    return scores_of(seen, texts, references.real, references.copies)
