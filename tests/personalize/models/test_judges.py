"""Opening the models that judge pictures; that they see what metrics/similarity.py asks them for."""

from __future__ import annotations

import shutil

import pytest
import torch
from PIL import Image

from improved_diffusion.errors import UserError
from improved_diffusion.metrics.similarity import dino_embeddings, image_embeddings, text_embeddings

transformers = pytest.importorskip("transformers")
from safetensors.torch import load_file, save_file  # noqa: E402

from improved_diffusion.personalize.models.judges import load_blip, load_clip, load_vision  # noqa: E402

LOADERS = {"clip": load_clip, "dino": load_vision, "blip": load_blip}
IMAGES = [Image.new("RGB", (40, 30), "red"), Image.linear_gradient("L"), Image.new("RGBA", (9, 60), "#0040ff80")]


@pytest.fixture(params=LOADERS)
def kind(request) -> str:
    return request.param


@pytest.fixture
def copy(kind, tiny_judges, tmp_path):
    """A folder of that kind, to be damaged."""
    return shutil.copytree(tiny_judges[kind], tmp_path / "copy")


def test_all_weights_come_from_the_folder(kind, tiny_judges):
    model, _ = LOADERS[kind](str(tiny_judges[kind]))
    stored = load_file(tiny_judges[kind] / "model.safetensors")
    found = model.state_dict()
    assert stored.keys() <= found.keys()
    for name, value in stored.items():
        assert torch.equal(found[name], value)
    assert not model.training


def test_half_precision_on_disk_is_float32_in_memory(kind, copy):
    model, _ = LOADERS[kind](str(copy))
    model.half().save_pretrained(copy)
    model, _ = LOADERS[kind](str(copy))
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}


def test_clip_embeds_images_and_texts(tiny_judges):
    model, processor = load_clip(str(tiny_judges["clip"]))
    images = image_embeddings(IMAGES, model, processor)
    texts = text_embeddings(["a photo of a dog", "an oil painting"], model, processor)
    assert images.shape == (3, 32)
    assert texts.shape == (2, 32)
    torch.testing.assert_close(torch.cat([images, texts]).norm(dim=1), torch.ones(5))
    assert (images @ images.T).fill_diagonal_(0).max() < 0.999  # it sees them apart


def test_dino_has_no_use_for_a_pooling_layer(tiny_judges, tmp_path):
    model, processor = load_vision(str(tiny_judges["dino"]))
    with_pooling = transformers.ViTModel(model.config)
    with_pooling.load_state_dict(model.state_dict(), strict=False)
    with_pooling.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    found = dino_embeddings(IMAGES, *load_vision(str(tmp_path)))
    assert torch.equal(found, dino_embeddings(IMAGES, model, processor))


def test_dinov2_will_do_as_well(tmp_path):
    config = transformers.Dinov2Config(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=4, image_size=28, patch_size=14
    )
    transformers.Dinov2Model(config).save_pretrained(tmp_path)
    transformers.BitImageProcessor(size={"shortest_edge": 28}, crop_size=28).save_pretrained(tmp_path)
    assert dino_embeddings(IMAGES, *load_vision(str(tmp_path))).shape == (3, 32)


@pytest.mark.parametrize(("kind", "other"), [("clip", "dino"), ("dino", "blip"), ("blip", "clip")], indirect=["kind"])
def test_another_kind_of_model_is_refused(kind, other, tiny_judges):
    with pytest.raises(UserError, match="its config.json says"):
        LOADERS[kind](str(tiny_judges[other]))


def _lose_a_tensor(file):
    tensors = load_file(file)
    tensors.popitem()
    save_file(tensors, file, metadata={"format": "pt"})


DAMAGE = {
    "weights gone": ("model.safetensors", lambda file: file.unlink()),
    "weights cut short": ("model.safetensors", lambda file: file.write_bytes(file.read_bytes()[:5000])),
    "a tensor missing": ("model.safetensors", _lose_a_tensor),
    "processor gone": ("*processor_config.json", lambda file: file.unlink()),
    "config damaged": ("config.json", lambda file: file.write_text("{")),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_folder_is_one_line(kind, copy, damage):
    name, spoil = DAMAGE[damage]
    for file in copy.glob(name):
        spoil(file)
    with pytest.raises(UserError, match=r"cannot be read: \S") as caught:
        LOADERS[kind](str(copy))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("kind", ["clip", "blip"], indirect=True)
def test_a_lost_vocabulary_is_one_line(kind, copy, lose_vocabulary):
    lose_vocabulary(copy)
    with pytest.raises(UserError, match=r"cannot be read: \S") as caught:
        LOADERS[kind](str(copy))
    assert "\n" not in str(caught.value)
