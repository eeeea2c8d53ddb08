"""Weights in few bits, parts that wait on the CPU, tiles: what they change of pictures, and what they do not."""

from __future__ import annotations

import json
import sys

import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn

pytest.importorskip("diffusers")
from improved_diffusion.errors import UserError  # noqa: E402
from improved_diffusion.personalize.config import AdapterConfig  # noqa: E402
from improved_diffusion.personalize.models.adapters import attach_adapters, trainable  # noqa: E402
from improved_diffusion.personalize.models.quantize import LIBRARIES, WEIGHT_BYTES, quantize  # noqa: E402
from improved_diffusion.personalize.studies.compare import compare  # noqa: E402

ERROR = {"nf4": 0.2, "fp8": 0.06, "int8": 0.02}  # of a product, relative to its size


@pytest.mark.parametrize("kind", LIBRARIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_layer_in_few_bits(kind, dtype):
    """Its product, its gradient, what it holds, and that it keeps no longer copy for the backward pass."""
    pytest.importorskip(LIBRARIES[kind])
    torch.manual_seed(0)
    whole = nn.Sequential(nn.Linear(256, 128), nn.SiLU()).to(dtype)
    weight = whole[0].weight.detach().clone()
    x = torch.randn(5, 256, dtype=dtype, requires_grad=True)
    expected = whole(x).detach()
    quantize(whole, kind)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor.shape) or tensor, lambda t: t):
        found = whole[0](x)
    assert weight.shape not in kept
    error = (F.silu(found) - expected).float().norm() / expected.float().norm()
    assert 0 < error < ERROR[kind]
    found.sum().backward()
    exact = torch.ones(5, 128, dtype=dtype) @ weight
    assert (x.grad - exact).float().norm() < ERROR[kind] * exact.float().norm()
    held = [p for p in whole.parameters() if p.dim() > 1]
    held = [getattr(p, "qdata", p) for p in held]  # torchao's, which says the longer type of itself
    assert sum(p.nbytes for p in held) == pytest.approx(int(WEIGHT_BYTES[kind]) * weight.numel() or weight.numel() / 2)


def test_adapters_before_and_after_are_the_same(fresh_base):
    pytest.importorskip("torchao")
    outputs = []
    for first in ("adapters", "bits"):
        base = fresh_base("sd")
        if first == "bits":
            quantize(base.unet, "int8")
        attach_adapters(base, AdapterConfig(rank=2), text_encoders=False)
        if first == "adapters":
            quantize(base.unet, "int8")
        states = torch.ones(1, 77, base.unet.config.cross_attention_dim)
        output = base.unet(torch.ones(1, 4, 8, 8), torch.tensor([9]), states).sample
        output.square().mean().backward()
        assert all(parameter.grad is not None for parameter in trainable(base.unet))
        outputs.append(output.detach())
    assert torch.equal(*outputs)


@pytest.fixture
def generate(run_script, tiny_bases, tmp_path):
    def run(name: str, *flags: str, n: int = 2):
        where = (f"--base={tiny_bases['sd']}", f"--out={tmp_path / name}", f"--n={n}", "--steps=2")
        return run_script("personalize.py", "generate", "a dog", *where, *flags)

    return run


def test_what_few_bits_cost_is_measured(generate, run_script, tmp_path):
    pytest.importorskip("torchao")
    ways = {"plain": (), "int8": ("--quantize=int8",), "elsewhere": ("--offload", "--vae-tiling")}
    for name, flags in ways.items():
        outcome = generate(name, *flags)
        assert outcome.code == 0, outcome.err
    folders = [tmp_path / name for name in ways]
    outcome = run_script("personalize.py", "compare", *folders, f"--json={tmp_path / 'result.json'}")
    assert outcome.code == 0, outcome.err
    int8, elsewhere, seed = json.loads((tmp_path / "result.json").read_text())
    assert elsewhere["equal"] == 2  # a tile is larger than these pictures
    assert 0 < int8["difference"]["mean"] < seed["difference"]["mean"] / 10
    assert [line.split()[0] for line in outcome.out.splitlines()] == [*map(str, folders), "another"]
    assert seed["difference"]["n"] == 1


def test_what_cannot_be_compared_is_one_line(tmp_path):
    for name, seed, size in (("a", 0, 8), ("b", 1, 8), ("c", 0, 16)):
        (tmp_path / name).mkdir()
        Image.new("RGB", (size, size)).save(tmp_path / name / "0.png")
        record = {"file_name": "0.png", "text": "a dog", "seed": seed}
        (tmp_path / name / "metadata.jsonl").write_text(json.dumps(record))
    assert len(compare(tmp_path / "a", [tmp_path / "a"])) == 1  # a single seed is no scale
    for name, message in (("b", "has other prompts or seeds"), ("c", "its reference"), ("d", "is no finished folder")):
        with pytest.raises(UserError, match=message):
            compare(tmp_path / "a", [tmp_path / name])


@pytest.mark.parametrize("kind", LIBRARIES)
def test_a_library_that_is_missing_is_named(kind, generate, monkeypatch):
    monkeypatch.setitem(sys.modules, LIBRARIES[kind], None)
    outcome = generate("out", f"--quantize={kind}")
    assert outcome.is_one_clear_line(), outcome.err
    assert f"{LIBRARIES[kind]} is missing: in the checkout, pip install -e '.[few-bits]'" in outcome.err


def test_large_pictures_are_decoded_in_tiles(fresh_base, monkeypatch):
    monkeypatch.setattr("improved_diffusion.personalize.models.base.TILE", 64)
    base = fresh_base("sd")
    vae = base.pipeline.vae
    base.tile_vae()
    latents = torch.randn(1, 4, 64, 64)
    with torch.no_grad():
        tiled = vae.decode(latents).sample
        vae.disable_tiling()
        whole = vae.decode(latents).sample
    assert tiled.shape == whole.shape
    assert not torch.equal(tiled, whole)
    assert (vae.tile_sample_min_size, vae.tile_latent_min_size) == (64, 32)
