"""Opening the models that judge pictures: CLIP, DINO, ViT and BLIP, each with what prepares its input.

metrics/similarity.py measures with the first two, data/captioning.py describes images with the third.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    BlipForConditionalGeneration,
    BlipProcessor,
    CLIPModel,
    CLIPProcessor,
    Dinov2Model,
    ViTForImageClassification,
    ViTModel,
)
from transformers.image_processing_utils import BaseImageProcessor

from improved_diffusion.errors import UserError
from improved_diffusion.personalize.config import CLIP, DINO
from improved_diffusion.personalize.models.hub import opening, require_vocabulary

BLIP = "Salesforce/blip-image-captioning-base"


def load_clip(
    name: str = CLIP, device: torch.device | str = "cpu", setting: str = "--watch.clip"
) -> tuple[CLIPModel, CLIPProcessor]:
    """A CLIP model and its processor.

    Args:
        name: a folder that save_pretrained wrote, or a name on the Hugging Face hub.
        device: where it goes, in float32 and evaluation mode.
        setting: the flag that messages advise to give a folder with.

    Raises:
        UserError: no such folder, a damaged one, one of another kind of model, or a hub that cannot be reached; the
            message says what to download and where to put it.
    """
    return _load(name, device, setting, "CLIP model", {"clip": CLIPModel.from_pretrained}, CLIPProcessor)


def load_vision(
    name: str = DINO, device: torch.device | str = "cpu", setting: str = "--watch.vision"
) -> tuple[ViTModel | Dinov2Model, BaseImageProcessor]:
    """A DINO (Caron et al. 2021, arXiv:2104.14294) or DINOv2 (Oquab et al. 2023, arXiv:2304.07193) and its processor.

    Arguments and errors: see `load_clip`.
    """
    openers = {
        # DINO never trained the pooling layer that the class adds by default.
        "vit": functools.partial(ViTModel.from_pretrained, add_pooling_layer=False),
        "dinov2": Dinov2Model.from_pretrained,
    }
    return _load(name, device, setting, "DINO model", openers, AutoImageProcessor)


def load_blip(
    name: str = BLIP, device: torch.device | str = "cpu", setting: str = "--model"
) -> tuple[BlipForConditionalGeneration, BlipProcessor]:
    """A BLIP (Li et al. 2022, arXiv:2201.12086) that captions images, and its processor.

    Arguments and errors: see `load_clip`.
    """
    openers = {"blip": BlipForConditionalGeneration.from_pretrained}
    return _load(name, device, setting, "BLIP model", openers, BlipProcessor)


def load_vit_classifier(
    name: str, device: torch.device | str = "cpu", setting: str = "--features"
) -> tuple[ViTForImageClassification, BaseImageProcessor]:
    """A ViT (Dosovitskiy et al. 2020, arXiv:2010.11929) that tells classes apart, and its processor.

    Arguments and errors: see `load_clip`.
    """
    openers = {"vit": ViTForImageClassification.from_pretrained}
    return _load(name, device, setting, "ViT classifier", openers, AutoImageProcessor)


def _load(
    name: str,
    device: torch.device | str,
    setting: str,
    what: str,
    openers: dict[str, Callable[..., Any]],
    processor_class: type,
) -> tuple[nn.Module, Any]:
    """`openers`: for each `model_type` of a config.json that will do, the `from_pretrained` to call."""
    with opening(name, what, "config.json", setting) as local_files_only:
        kind = AutoConfig.from_pretrained(name, local_files_only=local_files_only).model_type
        if kind not in openers:
            raise UserError(
                f"{name} is no {what}: its config.json says {kind!r}, not {' or '.join(map(repr, openers))}"
            )
        model, report = openers[kind](
            name, dtype=torch.float32, output_loading_info=True, local_files_only=local_files_only
        )
        if report["missing_keys"]:  # transformers would go on with random weights
            raise ValueError(f"it has no weights for {min(report['missing_keys'])}")
        processor = processor_class.from_pretrained(name, local_files_only=local_files_only)
        if hasattr(processor, "tokenizer"):
            require_vocabulary(processor.tokenizer)
    return model.eval().to(device), processor
