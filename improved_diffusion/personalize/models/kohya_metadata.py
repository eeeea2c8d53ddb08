"""What kohya's form says of an adapter in its header, by which other programs sort, show and merge such files: the
`ss_` keys of sd-scripts, as far as they mean the same here."""

from __future__ import annotations

import json

from improved_diffusion.personalize.config import PersonalizeConfig
from improved_diffusion.personalize.models.adapters import adapted_parts, adapter_config
from improved_diffusion.personalize.models.base import Base
from improved_diffusion.personalize.models.trained import resolution_of

V2_WIDTH = 1024  # of the texts that Stable Diffusion 2 is told; 768 in 1


def kohya_metadata(base: Base, config: PersonalizeConfig | None, step: int | None) -> dict[str, str]:
    """The `ss_` keys of the adapters of `base`; those of training only where the settings of its run, and the update
    that it comes from, are known."""
    said = {**_network(base, config), **({} if config is None else _training(base, config)), "ss_steps": step}
    return {key: str(value) for key, value in said.items() if value is not None}


def _network(base: Base, config: PersonalizeConfig | None) -> dict[str, object]:
    lora = adapter_config(next(iter(adapted_parts(base).values())))
    is_v2 = not base.is_sdxl and base.unet.config.cross_attention_dim == V2_WIDTH
    version = f"sd_v{2 if is_v2 else 1}{'_v' if base.prediction == 'v_prediction' else ''}"
    arguments: dict[str, str] = {}
    if lora.use_dora:  # sd-scripts' own networks have none
        arguments |= {"algo": "lora", "dora_wd": "True", "wd_on_output": "True"}
    if config is not None and config.adapter.targets == "kohya+convolutions":
        arguments |= {"conv_dim": str(lora.r), "conv_alpha": str(lora.lora_alpha)}
    return {
        "ss_network_module": "lycoris.kohya" if lora.use_dora else "networks.lora",
        "ss_network_dim": "Dynamic" if lora.rank_pattern else lora.r,
        "ss_network_alpha": "Dynamic" if lora.alpha_pattern else lora.lora_alpha,
        "ss_network_args": json.dumps(arguments) if arguments else None,
        "ss_base_model_version": "sdxl_base_v1-0" if base.is_sdxl else version,
        "ss_v2": is_v2,
        "ss_sd_model_name": base.name,
    }


def _training(base: Base, config: PersonalizeConfig) -> dict[str, object]:
    training, images = config.training, config.images
    return {
        "ss_learning_rate": training.lr,
        "ss_unet_lr": training.lr,
        "ss_text_encoder_lr": training.lr_text_encoder if config.train_text_encoder else None,
        "ss_max_train_steps": training.steps,
        "ss_num_epochs": training.epochs,
        "ss_batch_size_per_device": training.batch_size,
        "ss_gradient_accumulation_steps": training.accumulation,
        "ss_gradient_checkpointing": training.gradient_checkpointing,
        "ss_lr_scheduler": training.lr_schedule,
        "ss_lr_warmup_steps": training.warmup_steps,
        "ss_optimizer": training.optimizer,
        "ss_max_grad_norm": training.grad_clip,
        "ss_min_snr_gamma": training.min_snr_gamma,
        "ss_noise_offset": training.noise_offset,
        "ss_network_dropout": config.adapter.dropout,
        "ss_prior_loss_weight": config.prior.weight,
        "ss_num_reg_images": sum(part.prior.images for part in config.parts),
        "ss_caption_dropout_rate": images.caption_dropout,
        "ss_shuffle_caption": images.shuffle_tags,
        "ss_keep_tokens": images.keep_tags,
        "ss_clip_skip": config.text.clip_skip,
        "ss_max_token_length": config.text.max_token_length,
        "ss_masked_loss": images.has_masks,
        "ss_flip_aug": images.flip,
        "ss_enable_bucket": images.buckets,
        "ss_resolution": (resolution_of(config, base),) * 2,
        "ss_seed": config.seed,
    }
