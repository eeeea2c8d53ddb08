"""Writing a whole base into a single file, under the names of the original implementations (LDM for SD 1 and 2, sgm for
SDXL), which other programs and `from_single_file` of diffusers read.

The names are those of diffusers' scripts/convert_diffusers_to_original_stable_diffusion.py and ..._sdxl.py.
"""

from __future__ import annotations

import re
from pathlib import Path

import torch
from diffusers import AutoencoderKL
from safetensors.torch import save_file
from torch import Tensor, nn

from improved_diffusion.errors import UserError
from improved_diffusion.files import atomic_write
from improved_diffusion.personalize.models.base import Base
from improved_diffusion.personalize.models.kohya import original_name
from improved_diffusion.personalize.models.single_file import TEXT_ENCODERS, UNET, VAE

FILE = "model.safetensors"
# Of the autoencoder and of OpenCLIP: what diffusers and transformers call a layer, and what the original does.
OF_VAE = (
    (r"mid_block\.resnets\.0", "mid.block_1"),
    (r"mid_block\.resnets\.1", "mid.block_2"),
    (r"mid_block\.attentions\.0\.group_norm", "mid.attn_1.norm"),
    (r"mid_block\.attentions\.0\.to_([qkv])", r"mid.attn_1.\1"),
    (r"mid_block\.attentions\.0\.to_out\.0", "mid.attn_1.proj_out"),
    (r"down_blocks\.(\d+)\.resnets\.(\d+)", r"down.\1.block.\2"),
    (r"down_blocks\.(\d+)\.downsamplers\.0", r"down.\1.downsample"),
    (r"up\.(\d+)\.resnets\.(\d+)", r"up.\1.block.\2"),
    (r"up\.(\d+)\.upsamplers\.0", r"up.\1.upsample"),
    (r"conv_shortcut", "nin_shortcut"),
    (r"conv_norm_out", "norm_out"),
)
OF_OPENCLIP = (
    (r"text_model\.embeddings\.position_embedding\.weight", "positional_embedding"),
    (r"text_model\.embeddings\.token_embedding", "token_embedding"),
    (r"text_model\.final_layer_norm", "ln_final"),
    (r"text_projection\.weight", "text_projection"),
    (r"text_model\.encoder\.layers\.(\d+)", r"transformer.resblocks.\1"),
    (r"layer_norm([12])", r"ln_\1"),
    (r"mlp\.fc1", "mlp.c_fc"),
    (r"mlp\.fc2", "mlp.c_proj"),
    (r"self_attn\.out_proj", "attn.out_proj"),
)


def export_single(base: Base, folder: Path) -> Path:
    """Write all weights, each in its own type, as FILE in the `folder`; and beside it, in a folder of the same name
    without the suffix, the settings and tokenizers, without which diffusers cannot open the file offline.

    Returns:
        The file.

    Raises:
        UserError: an autoencoder that has no original names.
    """
    vae = base.pipeline.vae
    if not isinstance(vae, AutoencoderKL):
        raise UserError(f"a single file has no names for the weights of {type(vae).__name__}: use the form diffusers")
    state = {f"{UNET}{name}": tensor for name, tensor in _unet_state(base.unet).items()}
    state |= {f"{VAE}{name}": tensor for name, tensor in _vae_state(vae).items()}
    is_openclip = [False, True] if base.is_sdxl else [base.unet.config.use_linear_projection]  # SD 2 has both
    kind = "xl_base" if base.is_sdxl else "v2" if is_openclip[0] else "v1"
    encoders = zip(TEXT_ENCODERS[kind], base.text_encoders.values(), is_openclip, strict=True)
    for prefix, encoder, open_clip in encoders:
        named = _openclip_state(encoder) if open_clip else encoder.state_dict()
        state |= {f"{prefix}{name}": tensor for name, tensor in named.items()}
    if base.is_sdxl:  # by which ComfyUI and others tell what the network predicts; of SD 1 and 2 the user has to say it
        marks = {"v_pred": base.prediction == "v_prediction", "ztsnr": base.has_zero_terminal_snr}
        state |= {name: torch.empty(0) for name, is_so in marks.items() if is_so}
    file = folder / FILE
    with atomic_write(file) as temporary:
        save_file({name: tensor.contiguous() for name, tensor in state.items()}, temporary, metadata={"format": "pt"})
    _write_settings(base, file.with_suffix(""))
    return file


def _unet_state(unet: nn.Module) -> dict[str, Tensor]:
    state = {}
    for key, tensor in unet.state_dict().items():
        module, _, what = key.rpartition(".")
        name = "out.0" if module == "conv_norm_out" else original_name(module, unet.config)
        state[f"{name}.{what}"] = tensor
    return state


def _vae_state(vae: nn.Module) -> dict[str, Tensor]:
    """The original numbers the levels of its decoder from the last, and its attention is made of convolutions."""
    last, state = len(vae.config.block_out_channels) - 1, {}
    for key, tensor in vae.state_dict().items():
        name = re.sub(r"up_blocks\.(\d+)", lambda match: f"up.{last - int(match[1])}", key)
        name = _renamed(name, OF_VAE)
        is_product = re.search(r"attn_1\.(q|k|v|proj_out)\.weight$", name)
        state[name] = tensor[:, :, None, None] if is_product else tensor
    return state


def _openclip_state(encoder: nn.Module) -> dict[str, Tensor]:
    """The original has queries, keys and values in one matrix, and its projection the other way round."""
    state, projections = {}, {}
    for key, tensor in encoder.state_dict().items():
        if match := re.fullmatch(r"(.+\.self_attn)\.([qkv])_proj\.(weight|bias)", key):
            layer, which, what = match.groups()
            name = _renamed(layer, OF_OPENCLIP).replace("self_attn", "attn")
            projections.setdefault(f"{name}.in_proj_{what}", {})[which] = tensor
        else:
            state[_renamed(key, OF_OPENCLIP)] = tensor.T if key == "text_projection.weight" else tensor
    return state | {name: torch.cat([parts[which] for which in "qkv"]) for name, parts in projections.items()}


def _renamed(name: str, rules: tuple[tuple[str, str], ...]) -> str:
    for pattern, replacement in rules:
        name = re.sub(pattern, replacement, name)
    return name


def _write_settings(base: Base, folder: Path) -> None:
    """As `save_pretrained` does, but for the weights."""
    base.pipeline.save_config(folder)
    for name, part in base.pipeline.components.items():
        if isinstance(part, nn.Module) and not hasattr(part, "save_config"):  # transformers' part
            part.config.save_pretrained(folder / name)
        elif hasattr(part, "save_config"):
            part.save_config(folder / name)
        elif part is not None:
            part.save_pretrained(folder / name)
