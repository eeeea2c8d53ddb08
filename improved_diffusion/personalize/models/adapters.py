"""Low-rank adapters of a base: LoRA (Hu et al. 2021, arXiv:2106.09685), DoRA (Liu et al. 2024, arXiv:2402.09353)."""

from __future__ import annotations

import torch
from peft import LoraConfig, get_peft_model_state_dict
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from improved_diffusion.errors import UserError
from improved_diffusion.personalize.config import AdapterConfig
from improved_diffusion.personalize.models.base import Base

ADAPTER = "personalized"
ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")
FEEDFORWARD = ("ff.net.0.proj", "ff.net.2")
PROJECTIONS = ("proj_in", "proj_out")  # into and out of a block of transformers
RESNETS = ("conv1", "conv2", "conv_shortcut", "time_emb_proj", "downsamplers.0.conv", "upsamplers.0.conv")
TEXT_ATTENTION = ("q_proj", "k_proj", "v_proj", "out_proj")
TEXT_MLP = ("fc1", "fc2")
# {adapter.targets: the layers of the UNet, and those of the text encoders}
TARGETS = {
    "attention": (ATTENTION, TEXT_ATTENTION),
    "attention+feedforward": (ATTENTION + FEEDFORWARD, TEXT_ATTENTION),
    "kohya": (ATTENTION + FEEDFORWARD + PROJECTIONS, TEXT_ATTENTION + TEXT_MLP),
    "kohya+convolutions": (ATTENTION + FEEDFORWARD + PROJECTIONS + RESNETS, TEXT_ATTENTION + TEXT_MLP),
}


def attach_adapters(base: Base, config: AdapterConfig, text_encoders: bool, seed: int = 0, name: str = ADAPTER) -> None:
    """Give the UNet, and the text encoders if wanted, a new adapter each, in place, beside those of other names.

    All that was there is frozen; what is new is float32 and trainable, and changes nothing yet."""
    for part in (base.unet, *base.text_encoders.values(), base.pipeline.vae):
        part.requires_grad_(False)
    unet_layers, text_layers = TARGETS[config.targets]
    chosen = [(base.unet, unet_layers)]
    if text_encoders:
        chosen += [(encoder, text_layers) for encoder in base.text_encoders.values()]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for part, targets in chosen:
            lora = LoraConfig(
                r=config.rank,
                lora_alpha=config.alpha,
                target_modules=list(targets),
                lora_dropout=config.dropout,
                use_dora=config.dora,
                init_lora_weights="gaussian",
            )
            part.add_adapter(lora, adapter_name=name)
            for parameter in trainable(part):
                parameter.data = parameter.data.float()
            part.eval()  # PEFT's layers come in training, and would drop out in drawing


def choose_adapters(base: Base, *names: str) -> None:
    """Let the base draw with the adapters of these names alone, in this order; without any as it was without any."""
    for layer in _adapted_layers(base):
        there = [name for name in names if name in layer._all_available_adapter_names()]
        if there:
            layer.set_adapter(there, inference_mode=True)
        layer._disable_adapters = not there  # `enable_adapters` would make the weights trainable


def remove_adapters(base: Base, name: str) -> None:
    """Take away the adapters of this name, and their memory."""
    choose_adapters(base)  # or PEFT would choose another one, and warn
    for layer in _adapted_layers(base):
        layer.delete_adapter(name)
    for part in (base.unet, *base.text_encoders.values()):
        getattr(part, "peft_config", {}).pop(name, None)


def _adapted_layers(base: Base) -> list[BaseTunerLayer]:
    return [m for part in adapted_parts(base).values() for m in part.modules() if isinstance(m, BaseTunerLayer)]


def trainable(part: nn.Module) -> list[nn.Parameter]:
    """The parameters of `part` that are trained."""
    return [parameter for parameter in part.parameters() if parameter.requires_grad]


def adapted_parts(base: Base) -> dict[str, nn.Module]:
    """{component name: part} of those that have an adapter."""
    parts = {"unet": base.unet, **base.text_encoders}
    return {name: part for name, part in parts.items() if any(isinstance(m, BaseTunerLayer) for m in part.modules())}


def adapter_parameters(part: nn.Module) -> list[nn.Parameter]:
    """Those of its adapter."""
    return [parameter for name, parameter in part.named_parameters() if f".{ADAPTER}." in f"{name}."]


def adapter_state(part: nn.Module, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """{name: weight} of its adapter on the CPU, names as PEFT has them: MODULE.lora_A.weight and so on."""
    state = get_peft_model_state_dict(part, adapter_name=ADAPTER)
    return {name: weight.detach().to("cpu", dtype).contiguous() for name, weight in state.items()}


def adapter_config(part: nn.Module) -> LoraConfig:
    """PEFT's settings of its adapter."""
    return part.peft_config[ADAPTER]


def set_scales(
    base: Base, unet: float, text_encoder: float, text_encoder_2: float | None = None, name: str = ADAPTER
) -> None:
    """Weigh the adapters of this name; 0 is the base as it was. Without a third number, both text encoders have the
    second.

    Raises:
        UserError: a scale other than 1 where there is no adapter, or between 0 and 1 of DoRA, which has no such thing:
            its magnitudes are not scaled with the update.
    """
    parts = {key: part for key, part in adapted_parts(base).items() if name in part.peft_config}
    if not parts and {unet, text_encoder, text_encoder_2} - {1.0, None}:
        raise UserError("the scales weigh adapters, and this model has none: leave them at 1")
    scales = {
        "unet": unet,
        "text_encoder": text_encoder,
        "text_encoder_2": text_encoder if text_encoder_2 is None else text_encoder_2,
    }
    for key, part in parts.items():
        scale = scales[key]
        if scale not in (0, 1) and part.peft_config[name].use_dora:
            raise UserError(f"DoRA cannot be weighed by {scale:g}: it is there (1) or not (0)")
        for module in part.modules():
            if isinstance(module, BaseTunerLayer) and name in module._all_available_adapter_names():
                module.enable_adapters(scale != 0)  # for DoRA a scale of 0 would leave its magnitudes
                module.set_scale(name, scale)
