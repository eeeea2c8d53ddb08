"""Masks go with their images: found, cropped, flipped, and as coarse as the latents; what is no mask is refused."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from improved_diffusion.errors import UserError

pytest.importorskip("diffusers")
from improved_diffusion.personalize.config import ImagesConfig, PersonalizeConfig, SubjectConfig  # noqa: E402
from improved_diffusion.personalize.data.captioned import open_captioned_set  # noqa: E402
from improved_diffusion.personalize.data.crops import cut, variants  # noqa: E402
from improved_diffusion.personalize.data.encoded_files import EncodedFiles  # noqa: E402
from improved_diffusion.personalize.data.examples import Examples  # noqa: E402
from improved_diffusion.personalize.data.learned import open_images  # noqa: E402
from improved_diffusion.personalize.data.masks import latent_mask, with_masks  # noqa: E402

BESIDE = ImagesConfig(masked_loss=True)


@pytest.fixture
def masked(tmp_path) -> Path:
    """A grey picture that is its own mask, in a folder of its own."""
    folder = tmp_path / "masked"
    folder.mkdir()
    noise = np.random.default_rng(0).integers(0, 256, (40, 64), np.uint8)
    Image.fromarray(noise).resize((96, 64)).save(folder / "a.png")
    (folder / "a.mask.png").write_bytes((folder / "a.png").read_bytes())
    return folder


def test_a_mask_is_cut_as_its_image_and_averaged_over_what_a_latent_stands_for(masked):
    (image,) = with_masks(open_captioned_set(masked), BESIDE).images
    for size in ((64, 64), (32, 48)):
        for variant in variants(3, flip=True):
            grey = (cut(image.load(), size, *variant).pixels[0] + 1) / 2
            blocks = grey.reshape(size[0] // 8, 8, size[1] // 8, 8).mean(dim=(1, 3))
            found = latent_mask(image, size, *variant, (size[0] // 8, size[1] // 8))
            torch.testing.assert_close(found, blocks[None], rtol=1e-5, atol=1e-5)


def test_a_mask_beside_an_image_is_no_image(masked):
    Image.new("RGB", (8, 8)).save(masked / "b.mask.png")  # the mask of nothing
    assert [image.name for image in open_captioned_set(masked).images] == ["a.png", "b.mask.png"]


def test_masks_in_a_folder_of_their_own(masked, tmp_path):
    (tmp_path / "masks").mkdir()
    (masked / "a.mask.png").rename(tmp_path / "masks" / "a.png")
    config = ImagesConfig(masked_loss=True, conditioning_data_dir=str(tmp_path / "masks"))
    (image,) = with_masks(open_captioned_set(masked), config).images
    assert np.array_equal(np.asarray(image.mask()), np.asarray(image.load())[..., 0])


def test_transparency_as_a_mask(tmp_path):
    sticker = np.zeros((16, 16, 4), np.uint8)
    sticker[:, :8, 3] = 255
    sticker[:, 8:12, 3] = 51
    Image.fromarray(sticker).save(tmp_path / "a.png")
    Image.new("RGB", (16, 16)).save(tmp_path / "b.png")
    transparent, opaque = with_masks(open_captioned_set(tmp_path), ImagesConfig(alpha_mask=True)).images
    found = latent_mask(transparent, (16, 16), 0.5, False, (2, 2))
    torch.testing.assert_close(found, torch.tensor([[[1.0, 0.1], [1.0, 0.1]]]))
    assert latent_mask(opaque, (16, 16), 0.5, False, (2, 2)).eq(1).all()


def test_other_masks_are_another_set_but_not_other_latents(masked, fresh_base, tmp_path, monkeypatch):
    monkeypatch.setenv("IMPROVED_DIFFUSION_CACHE", str(tmp_path / "cache"))
    base, subject = fresh_base("sd"), SubjectConfig("sks", "dog")
    config = PersonalizeConfig(data=str(masked), images=BESIDE, subject=subject)

    def encode():
        learned = open_images(config)
        examples = Examples(base, learned.training.images, [(64, 64)], config.images, EncodedFiles(base.pipeline.vae))
        return learned.content_hash, examples([0], [0]), len(list((tmp_path / "cache").rglob("*.tensors")))

    first, latents, count = encode()
    white = Image.new("L", (96, 64), 255)
    white.save(masked / "a.mask.png")
    second, again, still = encode()
    assert first != second
    assert torch.equal(again.mean, latents.mean)
    assert again.mask.eq(1).all()
    assert 0 < latents.mask.mean() < 0.9
    assert (count, still) == (1, 1)


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        (None, "1 of 1 images have no mask, a.png for one: draw .*a.mask.png, white where the image counts"),
        (Image.new("L", (64, 96), 255), "a.mask.png is 64 x 96 pixels large, and a.png 96 x 64"),
        (Image.new("L", (96, 64)), "is black all over: nothing of a.png would be learned"),
    ],
    ids=["none", "size", "black"],
)
def test_masks_that_will_not_do(masked, mask, message):
    (masked / "a.mask.png").unlink()
    if mask is not None:
        mask.save(masked / "a.mask.png")
    with pytest.raises(UserError, match=message):
        with_masks(open_captioned_set(masked), BESIDE)


def test_a_damaged_mask_and_settings_that_do_not_fit(masked):
    (masked / "a.mask.png").write_bytes(b"no picture")
    with pytest.raises(UserError, match="cannot read the mask"):
        with_masks(open_captioned_set(masked), BESIDE)
    with pytest.raises(UserError, match="set images.masked_loss true"):
        ImagesConfig(conditioning_data_dir="masks")
    with pytest.raises(UserError, match="set one of them"):
        ImagesConfig(masked_loss=True, alpha_mask=True)
