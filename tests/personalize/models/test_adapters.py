"""Adapters on tiny pipelines, and their files read back by diffusers."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from improved_diffusion.errors import UserError

pytest.importorskip("diffusers")
pytest.importorskip("peft")
from peft.tuners.lora import LoraLayer  # noqa: E402

from improved_diffusion.personalize.config import AdapterConfig  # noqa: E402
from improved_diffusion.personalize.models.adapters import (  # noqa: E402
    adapted_parts,
    attach_adapters,
    set_scales,
    trainable,
)
from improved_diffusion.personalize.models.base import DTYPES, Base  # noqa: E402
from improved_diffusion.personalize.models.export import export_diffusers, export_kohya  # noqa: E402
from improved_diffusion.personalize.models.kohya import kohya_name, original_name  # noqa: E402
from improved_diffusion.personalize.models.tuned import load_adapter  # noqa: E402
from improved_diffusion.personalize.verify import export  # noqa: E402

SDXL = SimpleNamespace(layers_per_block=2, up_block_types=["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"])


def picture(base: Base) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    output = base.pipeline(
        "a photo of a sks dog", num_inference_steps=2, height=32, width=32, generator=generator, output_type="pt"
    )
    return output.images


@torch.no_grad()
def disturb(base: Base, by: float = 0.3) -> None:
    """Adapters as training would leave them: not zero."""
    generator = torch.Generator().manual_seed(1)
    for part in adapted_parts(base).values():
        for parameter in trainable(part):
            parameter += by * torch.randn(parameter.shape, generator=generator)


def count_layers(part: torch.nn.Module) -> int:
    return sum(isinstance(module, LoraLayer) for module in part.modules())


@pytest.fixture(scope="module", params=["sd", "sdxl"])
def adapted(request, fresh_base) -> Base:
    """A base of each kind with adapters that were trained, which tests leave as it is."""
    base = fresh_base(request.param)
    attach_adapters(base, AdapterConfig(rank=3, alpha=5.0, targets="attention+feedforward"), text_encoders=True)
    disturb(base)
    return base


@pytest.fixture(scope="module")
def expected(adapted) -> torch.Tensor:
    """What it draws."""
    return picture(adapted)


@pytest.fixture(scope="module")
def files(adapted, tmp_path_factory) -> dict[str, Path]:
    """{form: file of its adapters}."""
    folder = tmp_path_factory.mktemp("adapters")
    return {"diffusers": export_diffusers(adapted, folder), "kohya": export_kohya(adapted, folder)}


def test_a_new_adapter_changes_nothing_and_freezes_the_rest(base):
    before = picture(base)
    attach_adapters(base, AdapterConfig(rank=3), text_encoders=True)
    assert torch.equal(picture(base), before)
    assert set(adapted_parts(base)) == {"unet", *base.text_encoders}
    for part in adapted_parts(base).values():
        names = [name for name, parameter in part.named_parameters() if parameter.requires_grad]
        assert names
        assert all("lora_" in name for name in names)
        assert all(parameter.dtype == torch.float32 for parameter in trainable(part))
    assert not trainable(base.pipeline.vae)


def test_without_text_encoders_the_unet_alone_has_one(base):
    attach_adapters(base, AdapterConfig(), text_encoders=False)
    assert set(adapted_parts(base)) == {"unet"}
    assert not any(trainable(encoder) for encoder in base.text_encoders.values())


def test_scales_weigh_each_part_and_zero_is_the_base(adapted, expected, fresh_base):
    plain = picture(fresh_base(Path(adapted.name).name))
    assert (expected - plain).abs().max() > 0.01
    set_scales(adapted, 0.0, 0.0)
    assert torch.equal(picture(adapted), plain)
    set_scales(adapted, 1.0, 0.0)
    unet_only = picture(adapted)
    set_scales(adapted, 0.0, 1.0)
    text_only = picture(adapted)
    assert len({image.numpy().tobytes() for image in (plain, expected, unet_only, text_only)}) == 4
    set_scales(adapted, 1.0, 1.0)
    assert torch.equal(picture(adapted), expected)


def test_dropout_is_for_training_alone(fresh_base, tmp_path):
    """Neither a run's adapters nor those of a file that names it drop anything in drawing."""
    base, fresh = fresh_base("sd"), fresh_base("sd")
    attach_adapters(base, AdapterConfig(rank=3, dropout=0.5), text_encoders=True)
    disturb(base)
    load_adapter(fresh, export_diffusers(base, tmp_path))
    drawn = [picture(model) for model in (base, base, fresh)]
    assert torch.equal(drawn[0], drawn[1])
    assert torch.equal(drawn[0], drawn[2])


def test_dora_is_there_or_not(base):
    plain = picture(base)
    attach_adapters(base, AdapterConfig(rank=3, dora=True), text_encoders=False)
    disturb(base)
    whole = picture(base)
    set_scales(base, 0.0, 0.0)
    assert torch.equal(picture(base), plain)
    set_scales(base, 1.0, 1.0)
    assert torch.equal(picture(base), whole)
    with pytest.raises(UserError, match=r"DoRA cannot be weighed by 0.5"):
        set_scales(base, 0.5, 1.0)


@pytest.mark.parametrize("form", ["diffusers", "kohya"])
def test_a_file_read_by_diffusers_gives_the_same_picture(adapted, expected, files, fresh_base, form):
    fresh = fresh_base(Path(adapted.name).name)
    fresh.pipeline.load_lora_weights(files[form].parent, weight_name=files[form].name)
    assert (picture(fresh) - expected).abs().max() == 0


def test_a_dora_read_by_diffusers_gives_the_same_picture(base, fresh_base, tmp_path):
    attach_adapters(base, AdapterConfig(rank=3, alpha=5.0, dora=True), text_encoders=False)
    disturb(base)
    file, expected, fresh = export_diffusers(base, tmp_path), picture(base), fresh_base(Path(base.name).name)
    assert not torch.equal(picture(fresh), expected)
    fresh.pipeline.load_lora_weights(file.parent, weight_name=file.name)
    assert (picture(fresh) - expected).abs().max() == 0


@pytest.mark.parametrize(
    ("kind", "form", "precision", "settings"),
    [
        ("sdxl", "diffusers", "bf16", {"targets": "kohya+convolutions"}),
        ("sdxl", "kohya", "fp16", {"targets": "kohya+convolutions"}),
        ("sd", "diffusers", "fp16", {"dora": True}),
        ("sd", "kohya", "float32", {"targets": "kohya+convolutions", "dora": True}),
    ],
)
def test_a_file_of_any_form_and_precision_draws_what_the_rounded_adapters_draw(
    fresh_base, tmp_path, kind, form, precision, settings
):
    base = fresh_base(kind)
    attach_adapters(base, AdapterConfig(rank=3, alpha=5.0, **settings), text_encoders=True)
    disturb(base, 0.05)
    exact = picture(base)
    file = export(base, None, form, tmp_path, precision)
    assert torch.equal(picture(base), exact) == (precision == "float32")
    assert {tensor.dtype for name, tensor in load_file(file).items() if "alpha" not in name} == {DTYPES[precision]}
    fresh = fresh_base(kind)
    load_adapter(fresh, file)
    assert torch.equal(picture(fresh), picture(base))


def test_a_number_too_large_for_fp16(base, tmp_path):
    attach_adapters(base, AdapterConfig(), text_encoders=False)
    trainable(base.unet)[0].data.fill_(1e6)
    with pytest.raises(UserError, match="a weight is too large for fp16"):
        export(base, None, "kohya", tmp_path, "fp16")
    assert list(tmp_path.iterdir()) == []


@torch.no_grad()
def test_kohyas_dora_is_what_lycoris_computes(base, tmp_path):
    """The weight and its change, each output scaled to the length in `dora_scale`."""
    attach_adapters(base, AdapterConfig(rank=3, alpha=5.0, targets="kohya+convolutions", dora=True), False)
    disturb(base, 0.1)
    state = load_file(export_kohya(base, tmp_path))
    for place in ("mid_block.attentions.0.transformer_blocks.0.attn1.to_q", "mid_block.resnets.0.conv1"):
        prefix = kohya_name(base, "unet", place)
        layer = base.unet.get_submodule(place)
        up, down = state[f"{prefix}.lora_up.weight"], state[f"{prefix}.lora_down.weight"]
        weight = layer.get_base_layer().weight
        whole = weight + (up.flatten(1) @ down.flatten(1)).reshape(weight.shape) * state[f"{prefix}.alpha"] / 3
        lengths = whole.flatten(1).norm(dim=1).reshape(-1, *[1] * (weight.dim() - 1))
        expected = whole * state[f"{prefix}.dora_scale"] / lengths
        layer.merge(adapter_names=["personalized"])
        torch.testing.assert_close(layer.get_base_layer().weight, expected, rtol=1e-4, atol=1e-5)


def test_a_dora_that_weighs_inputs_is_refused(base, tmp_path):
    attach_adapters(base, AdapterConfig(dora=True), text_encoders=False)

    def turn(state):
        return {key: tensor.reshape(1, -1) if "dora" in key else tensor for key, tensor in state.items()}

    file = edited(export_kohya(base, tmp_path), turn, tmp_path)
    with pytest.raises(UserError, match=r"weighs the inputs of unet\..*wd_on_output=True"):
        load_adapter(base, file)


def edited(file: Path, edit: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]], folder: Path) -> Path:
    """The adapter with its state edited, and the header that it had, in a `folder`."""
    with safe_open(file, framework="pt") as opened:
        header = opened.metadata()
    other = folder / "edited.safetensors"
    save_file(edit(load_file(file)), other, metadata=header)
    return other


@pytest.mark.parametrize("form", ["diffusers", "kohya"])
def test_the_layers_of_a_text_encoder_without_text_model(adapted, expected, files, fresh_base, tmp_path, form):
    """As diffusers and kohya write them under transformers 5.6 and later."""

    def flatten(state):
        return {re.sub(r"text_model[._]", "", key): tensor for key, tensor in state.items()}

    layers, fresh = sum(map(count_layers, adapted_parts(adapted).values())), fresh_base(Path(adapted.name).name)
    assert load_adapter(fresh, edited(files[form], flatten, tmp_path)) == (layers, layers)
    assert torch.equal(picture(fresh), expected)


@pytest.mark.parametrize("form", ["diffusers", "kohya"])
def test_layers_that_the_base_has_not_are_counted(adapted, expected, files, fresh_base, tmp_path, form):
    def add(state):
        strange = {
            "diffusers": ("unet.down_blocks.7.to_q.lora_A.weight", "unet.down_blocks.7.to_q.lora_B.weight"),
            "kohya": ("lora_te_text_model_encoder_layers_0_mlp_fc1.hada_w1_a", "lora_te3_fc1.lora_down.weight"),
        }[form]
        return {strange[0]: torch.ones(1), **state, strange[1]: torch.ones(1)}

    layers, unknown = sum(map(count_layers, adapted_parts(adapted).values())), {"diffusers": 1, "kohya": 2}[form]
    file = edited(files[form], add, tmp_path)
    fresh = fresh_base(Path(adapted.name).name)
    message = rf"knows {layers} of the {layers + unknown} layers of .*; --allow-unknown takes those {layers}$"
    with pytest.raises(UserError, match=message):
        load_adapter(fresh, file)
    assert not adapted_parts(fresh)
    assert load_adapter(fresh, file, allow_unknown=True) == (layers, layers + unknown)
    assert torch.equal(picture(fresh), expected)


def test_kohyas_keys_are_those_that_other_programs_look_for(adapted, files):
    state = load_file(files["kohya"])
    layer = "transformer_blocks_0_attn1_to_q"
    if adapted.is_sdxl:  # one layer a block: input convolution, block, halving, block
        wanted = {f"lora_unet_input_blocks_3_1_{layer}", f"lora_unet_output_blocks_1_1_{layer}"}
        wanted |= {f"lora_unet_middle_block_1_{layer}", "lora_te2_text_model_encoder_layers_2_self_attn_q_proj"}
        wanted.add("lora_te1_text_model_encoder_layers_0_self_attn_out_proj")
    else:
        wanted = {f"lora_unet_down_blocks_1_attentions_0_{layer}", f"lora_unet_mid_block_attentions_0_{layer}"}
        wanted.add("lora_te_text_model_encoder_layers_0_self_attn_q_proj")
    for name in wanted:
        assert state[f"{name}.lora_down.weight"].shape[0] == 3
        assert state[f"{name}.lora_up.weight"].shape[1] == 3
        assert state[f"{name}.alpha"] == 5.0
    assert {key.rsplit(".", 2)[-2] for key in state if key.endswith("weight")} == {"lora_down", "lora_up"}


@pytest.mark.parametrize(
    ("ours", "original"),
    [
        ("down_blocks.1.attentions.0.proj_in", "input_blocks.4.1.proj_in"),
        ("down_blocks.1.attentions.1.proj_in", "input_blocks.5.1.proj_in"),
        ("down_blocks.2.attentions.0.proj_in", "input_blocks.7.1.proj_in"),
        ("down_blocks.2.attentions.1.proj_in", "input_blocks.8.1.proj_in"),
        ("mid_block.attentions.0.proj_in", "middle_block.1.proj_in"),
        ("up_blocks.0.attentions.0.proj_in", "output_blocks.0.1.proj_in"),
        ("up_blocks.0.attentions.2.proj_in", "output_blocks.2.1.proj_in"),
        ("up_blocks.1.attentions.2.proj_in", "output_blocks.5.1.proj_in"),
        ("down_blocks.0.resnets.1.conv1", "input_blocks.2.0.in_layers.2"),
        ("down_blocks.0.downsamplers.0.conv", "input_blocks.3.0.op"),
        ("down_blocks.2.resnets.0.conv_shortcut", "input_blocks.7.0.skip_connection"),
        ("mid_block.resnets.1.time_emb_proj", "middle_block.2.emb_layers.1"),
        ("up_blocks.1.upsamplers.0.conv", "output_blocks.5.2.conv"),
        ("up_blocks.2.resnets.2.conv2", "output_blocks.8.0.out_layers.3"),
    ],
)
def test_the_blocks_of_sdxl_by_their_published_numbers(ours, original):
    assert original_name(ours, SDXL) == original


def test_layers_that_kohya_has_no_name_for():
    with pytest.raises(UserError, match=r"conv_norm_out, which kohya's form of SDXL has no name for"):
        original_name("conv_norm_out", SDXL)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rank": 0}, "rank must be at least 1"),
        ({"alpha": 0}, "positive"),
        ({"dropout": 1}, "dropout"),
    ],
)
def test_settings_that_make_no_sense(settings, message):
    with pytest.raises(UserError, match=message):
        AdapterConfig(**settings)
