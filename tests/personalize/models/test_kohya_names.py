"""Kohya's form of adapters of the published architectures: the names that sd-scripts and ComfyUI look for, and what
diffusers makes of the file."""

from __future__ import annotations

import copy
import functools
import hashlib
import runpy
from collections.abc import Callable
from itertools import product
from pathlib import Path

import pytest
import torch

pytest.importorskip("diffusers")
pytest.importorskip("peft")
from diffusers import UNet2DConditionModel  # noqa: E402
from peft import LoraConfig, get_peft_model_state_dict  # noqa: E402
from peft.tuners.lora import LoraLayer  # noqa: E402
from peft.tuners.tuners_utils import check_target_module_exists  # noqa: E402
from torch import Tensor  # noqa: E402

from improved_diffusion.personalize.config import AdapterConfig  # noqa: E402
from improved_diffusion.personalize.models.adapters import (  # noqa: E402
    ADAPTER,
    TARGETS,
    adapted_parts,
    attach_adapters,
    trainable,
)
from improved_diffusion.personalize.models.base import Base  # noqa: E402
from improved_diffusion.personalize.models.export import export_kohya, kohya_state  # noqa: E402

BENCHMARK = Path(__file__).parents[3] / "benchmarks" / "personalize_memory.py"
ATTENTION = [f"attn{i}_{layer}" for i, layer in product((1, 2), ("to_q", "to_k", "to_v", "to_out_0"))]
FEEDFORWARD = ["ff_net_0_proj", "ff_net_2"]
PROJECTIONS = ["proj_in", "proj_out"]
TEXT_ATTENTION = [f"self_attn_{layer}" for layer in ("q_proj", "k_proj", "v_proj", "out_proj")]
TEXT_MLP = ["mlp_fc1", "mlp_fc2"]

# {kind: {attention block: its number of transformer blocks}}
UNETS = {
    "sd": {
        "down_blocks_0_attentions_0": 1,
        "down_blocks_0_attentions_1": 1,
        "down_blocks_1_attentions_0": 1,
        "down_blocks_1_attentions_1": 1,
        "down_blocks_2_attentions_0": 1,
        "down_blocks_2_attentions_1": 1,
        "mid_block_attentions_0": 1,
        "up_blocks_1_attentions_0": 1,
        "up_blocks_1_attentions_1": 1,
        "up_blocks_1_attentions_2": 1,
        "up_blocks_2_attentions_0": 1,
        "up_blocks_2_attentions_1": 1,
        "up_blocks_2_attentions_2": 1,
        "up_blocks_3_attentions_0": 1,
        "up_blocks_3_attentions_1": 1,
        "up_blocks_3_attentions_2": 1,
    },
    "sdxl": {
        "input_blocks_4_1": 2,
        "input_blocks_5_1": 2,
        "input_blocks_7_1": 10,
        "input_blocks_8_1": 10,
        "middle_block_1": 10,
        "output_blocks_0_1": 10,
        "output_blocks_1_1": 10,
        "output_blocks_2_1": 10,
        "output_blocks_3_1": 2,
        "output_blocks_4_1": 2,
        "output_blocks_5_1": 2,
    },
}
# {kind: {prefix: layers of that text encoder}}
TEXT_ENCODERS = {"sd": {"lora_te": 12}, "sdxl": {"lora_te1": 12, "lora_te2": 32}}

# SHA-256 of the sorted lines "KEY SHAPE" of rank 2. They were made from the state of sd-scripts' own network (commit
# 48d368fa557731ad0488c07304dfeba8c07910eb), for targets of attention without its other layers, and each layer of these
# was found by ComfyUI (commit a125cd84b054a57729b5eecab930ca9408719832) at a weight of that shape.
DIGESTS = {
    ("sd", "attention"): "d131a82a4b6c299a5f1cee1c7d6d40bd1b59123e59fe426b15b841936413a35a",
    ("sd", "attention+feedforward"): "dc2b65d1bdfbf34e244d77c07981c181d896d83e983fd9d386de3528bec5fe57",
    ("sdxl", "attention"): "b4eafb53c2b7a7d6b00706131373514acb00192750ead1569648700fc383c2ed",
    ("sd", "kohya"): "164cfbe11237980c17c41f80b4cd8012813cd99bc2cf568f9829d62fa0ce0950",
    ("sd", "kohya+convolutions"): "6a52088af6a75a80352d9264c5de7917b0e0ced9714676ac7fdf6e438365b93a",
    ("sdxl", "kohya"): "17fdfe2e67a31ce8be285db1ed742da4d2aa968b91114bb065568bb025f4cd3f",
    ("sdxl", "kohya+convolutions"): "4ca496e970b43aefe9307d9819fb0beec28fd40a30d8931af38c17faa8b2e4b2",
}


@pytest.fixture(scope="module")
def published_base(scripts):
    return runpy.run_path(str(BENCHMARK))["published_base"]


def published_layers(kind: str, targets: str) -> set[str]:
    """Without convolutions."""
    layers = ATTENTION if targets == "attention" else ATTENTION + FEEDFORWARD
    kohya = targets == "kohya"
    return (
        {
            f"lora_unet_{block}_transformer_blocks_{i}_{layer}"
            for block, depth in UNETS[kind].items()
            for i, layer in product(range(depth), layers)
        }
        | {f"lora_unet_{block}_{layer}" for block, layer in product(UNETS[kind], PROJECTIONS) if kohya}
        | {
            f"{prefix}_text_model_encoder_layers_{i}_{layer}"
            for prefix, depth in TEXT_ENCODERS[kind].items()
            for i, layer in product(range(depth), TEXT_ATTENTION + (TEXT_MLP if kohya else []))
        }
    )


@pytest.fixture(scope="module")
def largest(published_base) -> Callable[[str], Base]:
    """Gives a published base with adapters of all layers that any targets name: to attach them takes seconds."""

    @functools.cache
    def attached(kind: str) -> Base:
        base = published_base(kind)
        attach_adapters(base, AdapterConfig(rank=2, targets="kohya+convolutions"), text_encoders=True)
        return base

    return attached


def state_of(base: Base, targets: str) -> dict[str, dict[str, Tensor]]:
    """{component: state} of what those targets have of the adapters of `base`, as PEFT chooses its layers."""
    chosen: dict[str, dict[str, Tensor]] = {}
    for name, part in adapted_parts(base).items():
        lora = LoraConfig(target_modules=list(TARGETS[targets][name != "unet"]))
        state = get_peft_model_state_dict(part, adapter_name=ADAPTER)
        layers = {
            layer for layer in {key.partition(".lora_")[0] for key in state} if check_target_module_exists(lora, layer)
        }
        chosen[name] = {key: tensor for key, tensor in state.items() if key.partition(".lora_")[0] in layers}
    return chosen


@pytest.mark.parametrize("targets", TARGETS)
def test_targets_have_the_layers_that_the_largest_have_of_them(fresh_base, targets):
    whole, base = fresh_base("sd"), fresh_base("sd")
    attach_adapters(whole, AdapterConfig(rank=2, targets="kohya+convolutions"), text_encoders=True)
    attach_adapters(base, AdapterConfig(rank=2, targets=targets), text_encoders=True)
    found = state_of(whole, targets)
    for name, part in adapted_parts(base).items():
        assert set(found[name]) == set(get_peft_model_state_dict(part, adapter_name=ADAPTER))


@pytest.mark.parametrize(
    ("kind", "targets", "modules"),
    [
        ("sd", "attention", 128 + 48),
        ("sd", "attention+feedforward", 160 + 48),
        ("sd", "kohya", 192 + 72),
        ("sd", "kohya+convolutions", 278 + 72),
        ("sdxl", "attention", 560 + 176),
        ("sdxl", "kohya", 722 + 264),
        ("sdxl", "kohya+convolutions", 788 + 264),
    ],
)
def test_published_architectures_have_the_names_that_others_look_for(largest, kind, targets, modules):
    base, state = largest(kind), {}
    for name, of_part in state_of(base, targets).items():
        state |= kohya_state(base, name, of_part)
    found = {key.partition(".")[0] for key in state}
    assert len(found) == modules
    if "convolutions" not in targets:
        assert found == published_layers(kind, targets)
    parts = ("lora_down.weight", "lora_up.weight", "alpha")
    assert set(state) == {f"{module}.{part}" for module, part in product(found, parts)}
    lines = "\n".join(sorted(f"{key} {list(tensor.shape)}" for key, tensor in state.items()))
    assert hashlib.sha256(lines.encode()).hexdigest() == DIGESTS[kind, targets]


@pytest.fixture(params=["sd", "sdxl"])
def narrow_base(request, published_base, fresh_base) -> Base:
    """A base whose UNet has the layers of the published one, of few channels, but at most two transformer blocks in a
    row, of SDXL's ten: they differ by their number alone."""
    base = fresh_base(request.param)
    published = published_base(request.param).unet.config
    layout = {name: published[name] for name in ("down_block_types", "up_block_types", "layers_per_block")}
    depth = {"transformer_layers_per_block": [1, 2, 2] if base.is_sdxl else 1}
    width = {"block_out_channels": [16] * len(published.block_out_channels), "attention_head_dim": 2}
    config = {**base.unet.config, **layout, **depth, **width}
    base.pipeline.register_modules(unet=UNet2DConditionModel.from_config(config))
    return base


def weight_changes(base: Base) -> dict[tuple[str, str], torch.Tensor]:
    """{(component, layer): what its adapter adds to its weight}."""
    return {
        (name, path): layer.get_delta_weight(ADAPTER)
        for name, part in adapted_parts(base).items()
        for path, layer in part.named_modules()
        if isinstance(layer, LoraLayer)
    }


def read_by_diffusers(base: Base, file: Path) -> dict[tuple[str, str], torch.Tensor]:
    base.pipeline.load_lora_weights(file.parent, weight_name=file.name, adapter_name=ADAPTER)
    return weight_changes(base)


def test_diffusers_finds_every_layer_of_the_published_layout(narrow_base, tmp_path):
    fresh = copy.deepcopy(narrow_base)
    attach_adapters(narrow_base, AdapterConfig(rank=2, alpha=3.0, targets="kohya+convolutions"), text_encoders=True)
    generator = torch.Generator().manual_seed(0)
    for part in adapted_parts(narrow_base).values():
        for parameter in trainable(part):
            parameter.data.normal_(generator=generator)
    expected = weight_changes(narrow_base)
    shortcuts = 2  # on the way down, which the published ones need, for their levels differ in channels
    layers = 788 - 6 * 8 * 10 if narrow_base.is_sdxl else 278  # ten in each transformer block that is left out
    assert sum(name == "unet" for name, _ in expected) == layers - shortcuts
    read = read_by_diffusers(fresh, export_kohya(narrow_base, tmp_path))
    assert set(read) == set(expected)
    assert max((read[layer] - expected[layer]).abs().max() for layer in expected) == 0


def test_layers_with_ranks_and_alphas_of_their_own(base, tmp_path):
    fresh = copy.deepcopy(base)
    lora = LoraConfig(
        r=3,
        lora_alpha=5.0,
        rank_pattern={"to_q": 2},
        alpha_pattern={"to_q": 1.0, "to_k": 4.0},
        target_modules=["to_q", "to_k", "to_v"],
        init_lora_weights=False,
    )
    torch.manual_seed(0)
    base.unet.add_adapter(lora, adapter_name=ADAPTER)
    read = read_by_diffusers(fresh, export_kohya(base, tmp_path))
    torch.testing.assert_close(read, weight_changes(base))
