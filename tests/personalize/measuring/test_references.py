"""Pictures are compared with the training images of what their prompts name."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("diffusers")
from improved_diffusion.personalize.data.captioned import CaptionedImage  # noqa: E402
from improved_diffusion.personalize.measuring.judge import Judge, Seen  # noqa: E402
from improved_diffusion.personalize.measuring.prompts import without_tokens  # noqa: E402
from improved_diffusion.personalize.measuring.references import (  # noqa: E402
    References,
    choose,
    rows_by_concept,
    score_pictures,
)


def embeddings(n: int, seed: int) -> torch.Tensor:
    return F.normalize(torch.randn(n, 8, generator=torch.Generator().manual_seed(seed)), dim=1)


def references(token: str | None, n: int, seed: int) -> References:
    return References(token, n, *(Seen(None, embeddings(n, seed + i)) for i in (0, 10)))


NOBODY = Judge(None, None, "cpu")  # pictures that are there as embeddings need none
PROMPTS = ("a oue cat", "a sks dog", "a sks-like thing beside a oue cat", "a oueh", "a SKS dog, oue")


def test_pictures_are_compared_with_what_their_prompts_name():
    sks, oue = references("sks", 3, 1), references("oue", 4, 2)
    assert rows_by_concept(PROMPTS, [sks, oue]) == {"oue": [0, 4], "sks": [1], "sks + oue": [2, 3]}
    pictures = embeddings(5, 5)
    found = score_pictures(NOBODY, Seen(None, pictures), PROMPTS, [sks, oue])
    assert set(found) == {"likeness", "copying"}
    means = {"sks": sks.real.vision.mean(0), "oue": oue.real.vision.mean(0)}
    means["both"] = torch.cat([sks.real.vision, oue.real.vision]).mean(0)
    expected = [pictures[i] @ means[name] for i, name in enumerate(("oue", "sks", "both", "both", "oue"))]
    torch.testing.assert_close(found["likeness"], torch.stack(expected))
    alone = score_pictures(NOBODY, Seen(None, pictures[1:2]), PROMPTS[1:2], [sks])
    torch.testing.assert_close(found["copying"][1:2], alone["copying"])


def test_copies_of_a_single_image_cannot_be_told_of_any_then():
    found = score_pictures(
        NOBODY, Seen(None, embeddings(2, 5)), PROMPTS[:2], [references("sks", 1, 1), references("oue", 3, 2)]
    )
    assert set(found) == {"likeness"}


@pytest.mark.parametrize(
    ("prompt", "read"),
    [
        ("a sks dog in the snow", "a dog in the snow"),
        ("a photo of <dog>, at night", "a photo of, at night"),
        ("a photo of sks", "a photo of"),
        ("a skshund, a SKS dog", "a skshund, a SKS dog"),
        ("sks dog beside a <dog>", "dog beside a"),
        ("sks", "sks"),
    ],
)
def test_clip_reads_no_rare_tokens(prompt, read):
    assert without_tokens(prompt, ["sks", "<dog>"]) == read


@settings(max_examples=30)
@given(st.lists(st.binary(max_size=4), unique=True, max_size=12), st.integers(1, 12), st.randoms())
def test_references_are_chosen_by_content(contents, most, random):
    images = [CaptionedImage(str(number), None, lambda data=data: data) for number, data in enumerate(contents)]
    chosen = choose(images, most)
    assert len(chosen) == min(most, len(images))
    assert list(chosen) == [image for image in images if image in chosen]
    shuffled = random.sample(images, len(images))
    assert {image.read() for image in choose(shuffled, most)} == {image.read() for image in chosen}
    assert list(choose(images, None)) == images
