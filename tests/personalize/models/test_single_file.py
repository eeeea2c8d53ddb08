"""Bases in a single file: written, read back, and what is none."""

from __future__ import annotations

import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from improved_diffusion.errors import UserError

pytest.importorskip("diffusers")
from improved_diffusion.personalize.models.base import load_base, load_tokenizer  # noqa: E402
from improved_diffusion.personalize.models.export_single import export_single  # noqa: E402
from improved_diffusion.personalize.models.single_file import kind_of, settings_of  # noqa: E402

KINDS = {"sd": "v1", "sd2": "v2", "sdxl": "xl_base"}


# Some of each part, as they are in v1-5-pruned.safetensors, v2-1_768-nonema-pruned.safetensors and
# sd_xl_base_1.0.safetensors.
OF_TEXT = {
    "sd": ("cond_stage_model.transformer.text_model.encoder.layers.0.self_attn.q_proj.weight",),
    "sd2": (
        "cond_stage_model.model.transformer.resblocks.0.attn.in_proj_weight",
        "cond_stage_model.model.positional_embedding",
        "cond_stage_model.model.ln_final.bias",
    ),
    "sdxl": (
        "conditioner.embedders.0.transformer.text_model.embeddings.token_embedding.weight",
        "conditioner.embedders.1.model.transformer.resblocks.3.mlp.c_proj.bias",
        "conditioner.embedders.1.model.text_projection",
        "model.diffusion_model.label_emb.0.2.weight",
    ),
}
OF_ALL = (
    "model.diffusion_model.time_embed.0.weight",
    "model.diffusion_model.input_blocks.1.0.in_layers.0.weight",
    "model.diffusion_model.input_blocks.2.0.op.weight",
    "model.diffusion_model.middle_block.1.transformer_blocks.0.attn2.to_k.weight",
    "model.diffusion_model.output_blocks.1.2.conv.bias",
    "model.diffusion_model.out.0.weight",
    "first_stage_model.encoder.down.0.downsample.conv.weight",
    "first_stage_model.decoder.up.1.upsample.conv.weight",
    "first_stage_model.decoder.mid.attn_1.norm.weight",
    "first_stage_model.quant_conv.weight",
)


@pytest.mark.parametrize("kind", KINDS)
def test_a_whole_base_is_exported_and_read_back(kind, fresh_base, tmp_path):
    """Every weight of it; tests/personalize/training/test_train.py compares a picture."""
    expected = fresh_base(kind)
    file = export_single(expected, tmp_path)
    assert kind_of(file) == KINDS[kind]
    state = load_file(file)
    assert set(OF_TEXT[kind] + OF_ALL) <= set(state)
    assert state["first_stage_model.decoder.mid.attn_1.q.weight"].dim() == 4  # a convolution
    read = load_base(str(file))
    assert (read.fingerprint(), read.prediction) == (expected.fingerprint(), expected.prediction)
    torch.testing.assert_close(read.pipeline.vae.state_dict(), expected.pipeline.vae.state_dict(), rtol=0, atol=0)


def test_what_a_model_of_sdxl_predicts_is_marked_as_other_programs_look_for_it(fresh_base, tmp_path):
    base = fresh_base("sdxl")
    assert not {"v_pred", "ztsnr"} & set(load_file(export_single(base, tmp_path / "epsilon")))
    scheduler = base.pipeline.scheduler
    changed = {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True}
    base.pipeline.scheduler = type(scheduler).from_config(scheduler.config, **changed)
    file = export_single(base, tmp_path / "v")
    assert {"v_pred", "ztsnr"} <= set(load_file(file))
    read = load_base(str(file))
    assert (read.prediction, read.has_zero_terminal_snr) == ("v_prediction", True)
    assert read.fingerprint() == base.fingerprint()


def test_settings_may_lie_in_a_folder_with_the_published_name(fresh_base, tmp_path, monkeypatch):
    file = export_single(fresh_base("sdxl"), tmp_path)
    assert load_tokenizer(str(file)).pad_token == "<|endoftext|>"
    assert settings_of(file) == str(tmp_path / "model")
    folder = (tmp_path / "model").rename(tmp_path / "stable-diffusion-xl-base-1.0")
    assert settings_of(file) == str(folder)
    shutil.rmtree(folder)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    message = (
        r"takes its settings and tokenizers from, stabilityai/stable-diffusion-xl-base-1.0 is neither in the cache.*"
        rf"--include '\*.json' '\*.txt' --local-dir DIR`.* bring the folder here as {folder}"
    )
    for load in (load_base, load_tokenizer):
        with pytest.raises(UserError, match=message):
            load(str(file))


def headers(*names: str) -> dict[str, torch.Tensor]:
    return {name: torch.zeros(1) for name in names}


NO_BASES = {
    "flux": (headers("double_blocks.0.img_attn.norm.key_norm.scale"), "another architecture, flux-schnell"),
    "sd3.5": (headers("model.diffusion_model.joint_blocks.37.x_block.mlp.fc1.weight"), "architecture, sd35_large"),
    "refiner": (
        headers("conditioner.embedders.0.model.transformer.resblocks.9.mlp.c_proj.bias"),
        "another architecture, xl_refiner",
    ),
    "kohya": (headers("lora_unet_mid_block_attentions_0_proj_in.lora_down.weight"), "is an adapter.*--adapter"),
    "unet": (headers("model.diffusion_model.out.0.weight"), "holds no whole base"),
}


@pytest.mark.parametrize("name", NO_BASES)
def test_another_architecture_is_one_line(name, run_script, tmp_path):
    state, message = NO_BASES[name]
    save_file(state, tmp_path / "dog.safetensors")
    with pytest.raises(UserError, match=message):
        load_base(str(tmp_path / "dog.safetensors"))


def test_a_wrong_file_ends_a_command_with_one_line(run_script, tmp_path):
    (tmp_path / "damaged.safetensors").write_bytes(b"\x10\x00")
    (tmp_path / "old.ckpt").write_bytes(b"\x10\x00")
    problems = {"missing.safetensors": "does not exist", "damaged.safetensors": "cannot be read", "old.ckpt": "pickle"}
    for name, problem in problems.items():
        where = (f"--base={tmp_path / name}", f"--out={tmp_path}/out")
        outcome = run_script("personalize.py", "generate", "a dog", *where)
        assert outcome.is_one_clear_line(), outcome.err
        assert problem in outcome.err


def test_a_file_that_does_not_fit_its_settings(fresh_base, tiny_bases, tmp_path):
    file = export_single(fresh_base("sd"), tmp_path)
    shutil.rmtree(tmp_path / "model")
    shutil.copytree(tiny_bases["sd2"], tmp_path / "model")
    with pytest.raises(UserError, match="cannot be read") as caught:
        load_base(str(file))
    assert "\n" not in str(caught.value)


def test_a_variant_of_the_weights(tiny_bases, tmp_path):
    pipeline = load_base(str(tiny_bases["sd"])).pipeline
    pipeline.to(torch.float16).save_pretrained(tmp_path, variant="fp16")
    base = load_base(str(tmp_path), "fp16")
    assert (base.variant, base.unet.dtype) == ("fp16", torch.float32)
    expected = pipeline.unet.conv_in.weight.float()
    torch.testing.assert_close(base.unet.conv_in.weight, expected, rtol=0, atol=0)
    with pytest.raises(UserError, match="but those of a variant: give --variant fp16"):
        load_base(str(tmp_path))
    with pytest.raises(UserError, match="has no variant fp16"):
        load_base(str(tmp_path / "dog.safetensors"), "fp16")
