"""What was encoded is found again on disk, unless it was made of something else or its file is damaged."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

pytest.importorskip("diffusers")
from improved_diffusion.personalize.config import ImagesConfig, TextConfig  # noqa: E402
from improved_diffusion.personalize.data import examples  # noqa: E402
from improved_diffusion.personalize.data.captioned import open_captioned_set  # noqa: E402
from improved_diffusion.personalize.data.encoded_files import EncodedFiles  # noqa: E402
from improved_diffusion.personalize.data.examples import Conditions, Examples  # noqa: E402


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("IMPROVED_DIFFUSION_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def encoded(monkeypatch) -> list[str]:
    """What was encoded, in order: a word for each."""
    done = []

    def counting(name):
        really = getattr(examples, name)
        monkeypatch.setattr(examples, name, lambda *arguments: (done.append(name), really(*arguments))[1])

    counting("latent_moments")
    counting("encode_texts")
    return done


def test_images_and_texts_are_encoded_once(base, photos, cache, encoded):
    images, config = open_captioned_set(photos).images, ImagesConfig(crops=2, flip=True)
    sizes = [(32, 32)] * len(images)
    every = [(image, variant) for image in range(len(images)) for variant in range(4)]

    def encode() -> list[torch.Tensor]:
        of_images = Examples(base, images, sizes, config, EncodedFiles(base.pipeline.vae))
        of_texts = Conditions(base, True, EncodedFiles(*base.text_encoders.values()))
        return [*of_images(*zip(*every, strict=True)), *dict(sorted(of_texts(["a ball", "a disc"]).items())).values()]

    first = encode()
    assert (encoded.count("latent_moments"), encoded.count("encode_texts")) == (len(every), 2)
    encoded.clear()
    assert all(map(torch.equal, first, encode()))
    assert encoded == []

    files = sorted(cache.rglob("*.tensors"))
    whole = files[0].read_bytes()
    files[0].write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    files[1].write_bytes(b"")
    files[2].unlink()
    assert all(map(torch.equal, first, encode()))
    assert len(encoded) == 3
    encoded.clear()
    assert all(map(torch.equal, first, encode()))
    assert encoded == []


def test_a_text_that_is_read_otherwise_is_another_file(fresh_base, cache, encoded):
    base = fresh_base("sd")
    for number, how in enumerate([TextConfig(), TextConfig(clip_skip=2), TextConfig(max_token_length=150)] * 2):
        Conditions(replace(base, text=how), True, EncodedFiles(*base.text_encoders.values()))(["a ball"])
        assert len(encoded) == min(number + 1, 3)


def test_another_autoencoder_image_or_crop_is_another_file(fresh_base, photos, cache, encoded):
    base, images = fresh_base("sd"), open_captioned_set(photos).images[:2]

    def encode(images=images, size=(32, 32), **config) -> int:
        encoded.clear()
        Examples(base, images, [size] * len(images), ImagesConfig(**config), EncodedFiles(base.pipeline.vae))
        return len(encoded)

    assert [encode(), encode(), encode(images[::-1])] == [2, 0, 0]
    assert [encode(size=(32, 48)), encode(background="black"), encode(flip=True)] == [2, 2, 2]
    base.pipeline.vae.double()
    assert encode() == 2
    with torch.no_grad():
        next(base.pipeline.vae.parameters()).add_(1)
    assert encode() == 2


def test_processes_take_other_images_first(fresh_base, photos, cache, encoded):
    """A second process finds what the first has encoded by then, and begins with what it comes to last."""
    base, images = fresh_base("sd"), open_captioned_set(photos).images
    files, sizes = EncodedFiles(base.pipeline.vae), [(32, 32)] * len(images)
    Examples(base, images[:2], sizes[:2], ImagesConfig(), files)
    second = Examples(base, images, sizes, ImagesConfig(), files, share=(1, 2))
    assert encoded == ["latent_moments"] * len(images)
    assert list(second._kept) == [(index, 0) for index in (2, 3, 4, 0, 1)]


def test_a_cache_that_cannot_be_written_is_none(fresh_base, photos, cache, encoded):
    cache.write_text("a file where the folder should be")
    base, images = fresh_base("sd"), open_captioned_set(photos).images
    for _ in range(2):
        Examples(base, images, [(32, 32)] * len(images), ImagesConfig(), EncodedFiles(base.pipeline.vae))
    assert len(encoded) == 2 * len(images)
