"""Against the models' own logits, on tiny CLIP, DINO and DINOv2 networks with random weights."""

from __future__ import annotations

import copy
import json
import runpy
import string
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn

from improved_diffusion.errors import UserError
from improved_diffusion.metrics import pairs, similarity
from improved_diffusion.metrics.similarity import (
    clip_i,
    clip_score,
    dino,
    dino_embeddings,
    image_embeddings,
    pick_preferences,
    pick_score,
    text_embeddings,
)

transformers = pytest.importorskip("transformers")

POSITIONS = 16  # tokens
START = 2 * len(string.ascii_lowercase)  # after the letters, and the letters at the end of a word
END = START + 1
TEXTS = ["a cat", "two dogs", "pie", "a", "the sea", "red", "x y z"]


def randomized(model: nn.Module) -> nn.Module:
    """With weights large enough for embeddings that differ, cosines of both signs among them."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:  # biases would give all images one direction
                parameter.normal_(0, 0.4, generator=generator)
    return model.eval()


@pytest.fixture(scope="module")
def clip() -> nn.Module:
    size = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    text = {**size, "vocab_size": END + 1, "max_position_embeddings": POSITIONS, "eos_token_id": END}
    vision = {**size, "image_size": 16, "patch_size": 8}
    return randomized(
        transformers.CLIPModel(transformers.CLIPConfig(text_config=text, vision_config=vision, projection_dim=12))
    )


@pytest.fixture(scope="module")
def processor(tmp_path_factory):
    """CLIP's, with letters for tokens."""
    folder = tmp_path_factory.mktemp("tokenizer")
    letters = string.ascii_lowercase
    tokens = [*letters, *(f"{letter}</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    (folder / "vocab.json").write_text(json.dumps({token: number for number, token in enumerate(tokens)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    tokenizer = transformers.CLIPTokenizer.from_pretrained(folder)
    return transformers.CLIPProcessor(image_processor=image_processor(), tokenizer=tokenizer)


def image_processor():
    return transformers.CLIPImageProcessor(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16})


@pytest.fixture(scope="module")
def images() -> np.ndarray:
    """uint8 (7, 20, 24, 3): coarse noise."""
    coarse = np.random.default_rng(0).integers(0, 256, (7, 5, 6, 3), dtype=np.uint8)
    return coarse.repeat(4, axis=1).repeat(4, axis=2)


def logits(clip, processor, images, texts) -> torch.Tensor:
    """(images, texts), by the forward pass of the model."""
    pillow = [Image.fromarray(image) for image in images]
    with torch.no_grad():
        return clip(**processor(text=texts, images=pillow, return_tensors="pt", padding=True)).logits_per_image


class OtherVersion(nn.Module):
    """A CLIPModel whose features come as transformers 4 (a tensor) or 5 (an object) returns them."""

    def __init__(self, clip: nn.Module, version: int):
        super().__init__()
        self.clip, self.version, self.config = clip, version, clip.config
        self.eval()

    def get_image_features(self, **inputs):
        return self.convert(self.clip.get_image_features(**inputs))

    def get_text_features(self, **inputs):
        return self.convert(self.clip.get_text_features(**inputs))

    def convert(self, output):
        tensor = output if isinstance(output, torch.Tensor) else output.pooler_output
        return tensor if self.version == 4 else SimpleNamespace(pooler_output=tensor)


def test_clip_score_is_the_models_cosine_cut_at_zero(clip, processor, images):
    cosine = logits(clip, processor, images, TEXTS).diagonal() / clip.logit_scale.exp()
    assert cosine.min() < -0.05
    assert cosine.max() > 0.05
    score = clip_score(images, TEXTS, clip, processor)
    assert score.dtype == torch.float32
    torch.testing.assert_close(score, 100 * cosine.clamp(min=0).detach(), atol=1e-4, rtol=1e-5)


def test_pick_score_and_preferences_are_the_models_logits(clip, processor, images):
    expected = logits(clip, processor, images, TEXTS)
    score = pick_score(images, TEXTS, clip, processor)
    torch.testing.assert_close(score, expected.diagonal(), atol=1e-4, rtol=1e-5)
    preferences = pick_preferences(images, TEXTS[1], clip, processor)
    torch.testing.assert_close(preferences, expected[:, 1].softmax(dim=0), atol=1e-5, rtol=1e-4)
    assert preferences.sum().item() == pytest.approx(1)


def test_clip_i_is_the_mean_over_all_pairs(clip, processor, images):
    embeddings = image_embeddings(images, clip, processor)
    expected = [
        np.mean([F.cosine_similarity(embeddings[i], embeddings[j], dim=0) for j in range(4, 7)]) for i in range(4)
    ]
    torch.testing.assert_close(clip_i(images[:4], images[4:], clip, processor), torch.tensor(expected))
    itself = clip_i(images[:1], images[:1], clip, processor)
    assert itself.item() == pytest.approx(1, abs=1e-6)


def test_dinov2_is_the_class_token(images):
    size = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 16, "patch_size": 8}
    model = randomized(transformers.Dinov2Model(transformers.Dinov2Config(**size)))
    with torch.no_grad():
        pixels = image_processor()(images=[Image.fromarray(image) for image in images], return_tensors="pt")
        tokens = model(**pixels).pooler_output  # of this network, the class token after the layer norm
    expected = F.cosine_similarity(tokens[:4, None], tokens[None, 4:], dim=2).mean(dim=1)
    torch.testing.assert_close(dino(images[:4], images[4:], model, image_processor()), expected)


def test_dino_does_not_take_the_pooled_output_of_a_vit(images):
    size = {"hidden_size": 24, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    model = randomized(transformers.ViTModel(transformers.ViTConfig(**size, image_size=16, patch_size=8)))
    seen = []
    hook = model.layernorm.register_forward_hook(lambda module, inputs, output: seen.append(output[:, 0]))
    embeddings = dino_embeddings(images, model, image_processor())
    hook.remove()
    torch.testing.assert_close(embeddings, F.normalize(torch.cat(seen), dim=1))


@pytest.mark.parametrize("version", [4, 5])
def test_both_return_types_of_transformers(clip, processor, images, version):
    other = OtherVersion(clip, version)
    assert torch.equal(image_embeddings(images, other, processor), image_embeddings(images, clip, processor))
    assert torch.equal(text_embeddings(TEXTS, other, processor), text_embeddings(TEXTS, clip, processor))


@pytest.mark.parametrize("batch_size", [1, 3, 100])
def test_neither_batches_nor_order_matter(clip, processor, images, batch_size):
    whole = pick_score(images, TEXTS, clip, processor)
    order = torch.randperm(7, generator=torch.Generator().manual_seed(1))
    shuffled = pick_score(images[order.numpy()], [TEXTS[i] for i in order], clip, processor, batch_size)
    torch.testing.assert_close(shuffled, whole[order], atol=1e-4, rtol=1e-5)


def test_every_kind_of_images_gives_the_same_bits(clip, processor, images):
    expected = image_embeddings(images, clip, processor)
    assert expected.shape == (7, 12)
    torch.testing.assert_close(expected.norm(dim=1), torch.ones(7))
    pillow = [Image.fromarray(image) for image in images]
    assert torch.equal(image_embeddings(torch.from_numpy(images), clip, processor), expected)
    assert torch.equal(image_embeddings(pillow, clip, processor), expected)
    assert torch.equal(image_embeddings([image.convert("RGBA") for image in pillow], clip, processor), expected)


def test_images_of_several_sizes(clip, processor, images):
    pillow = [Image.fromarray(images[0]), Image.fromarray(images[1]).resize((40, 17)), Image.new("L", (3, 30))]
    together = image_embeddings(pillow, clip, processor)
    apart = torch.cat([image_embeddings([image], clip, processor) for image in pillow])
    torch.testing.assert_close(together, apart)


def embedding_of(tokens: list[int], clip: nn.Module) -> torch.Tensor:
    """By the model's own text features."""
    row = torch.tensor([tokens])
    with torch.no_grad():
        output = clip.get_text_features(input_ids=row, attention_mask=torch.ones_like(row))
    return F.normalize(output if isinstance(output, torch.Tensor) else output.pooler_output, dim=1)[0]


def test_long_texts_are_cut_before_their_end_token_with_one_warning(clip, processor):
    long = "abcdefghijklmnopqrstuvwxyz"
    fits = "a" * (POSITIONS - 2)
    with pytest.warns(UserWarning, match="2 of 4 texts are longer than the 16 tokens") as record:
        embeddings = text_embeddings([long, "cat", fits, long + "x"], clip, processor, batch_size=1)
    assert len(record) == 1
    expected = embedding_of([START, *range(POSITIONS - 2), END], clip)
    torch.testing.assert_close(embeddings[0], expected)
    torch.testing.assert_close(embeddings[3], expected)


@pytest.mark.filterwarnings("error")
def test_texts_that_just_fit_are_whole_and_warn_of_nothing(clip, processor):
    (embedding,) = text_embeddings(["a" * (POSITIONS - 2)], clip, processor)
    last = len(string.ascii_lowercase)  # the a at the end of a word
    torch.testing.assert_close(embedding, embedding_of([START, *[0] * (POSITIONS - 3), last, END], clip))


def test_a_model_in_half_precision_gives_float32(clip, processor, images):
    half = copy.deepcopy(clip).bfloat16()
    score = pick_score(images, TEXTS, half, processor)
    assert score.dtype == torch.float32
    torch.testing.assert_close(score, pick_score(images, TEXTS, clip, processor), atol=1.5, rtol=0)


def test_mistakes_of_the_user_are_one_line(clip, processor, images):
    for metric in (clip_score, pick_score):
        with pytest.raises(UserError, match="7 images and 6 texts"):
            metric(images, TEXTS[:6], clip, processor)
    with pytest.raises(UserError, match="no images"):
        image_embeddings([], clip, processor)
    with pytest.raises(UserError, match="no references"):
        clip_i(images, images[:0], clip, processor)
    with pytest.raises(UserError, match="no texts"):
        text_embeddings([], clip, processor)
    broken = copy.deepcopy(clip)
    broken.visual_projection.weight.data.fill_(float("nan"))
    with pytest.raises(UserError, match="7 of a batch of 7 embeddings of images"):
        image_embeddings(images, broken, processor)


def test_mistakes_of_the_programmer_are_named(clip, processor, images):
    with pytest.raises(ValueError, match=r"uint8 \(N, H, W, 3\), got float32 \(7, 20, 24, 3\)"):
        image_embeddings(images.astype(np.float32), clip, processor)
    with pytest.raises(ValueError, match=r"got torch.uint8 \(7, 3, 20, 24\)"):
        image_embeddings(torch.from_numpy(images).permute(0, 3, 1, 2), clip, processor)
    with pytest.raises(ValueError, match="Pillow"):
        image_embeddings(list(images), clip, processor)
    with pytest.raises(ValueError, match="list of strings"):
        text_embeddings("a cat", clip, processor)
    with pytest.raises(ValueError, match="batch size"):
        image_embeddings(images, clip, processor, batch_size=0)
    with pytest.raises(ValueError, match="training mode"):
        image_embeddings(images, copy.deepcopy(clip).train(), processor)


@pytest.mark.parametrize(("module", "metric"), [(similarity, "clip_score"), (pairs, "lpips")])
def test_importing_needs_neither_transformers_nor_torchmetrics(monkeypatch, module, metric):
    for name in ("transformers", "torchmetrics"):
        monkeypatch.setitem(sys.modules, name, None)  # so that to import it is an error
    assert callable(runpy.run_path(module.__file__)[metric])
