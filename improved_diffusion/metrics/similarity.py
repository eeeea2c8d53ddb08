"""How alike images and texts are, by the embeddings of a CLIP or DINO model that the caller gives.

First the scores of images, then those of embeddings, which can be kept and compared again, then the embeddings. Models
and processors are those of Hugging Face transformers 4 or 5, or anything that is called the same way; nothing is
imported or downloaded here. Every value depends on the model, so name it beside the number. Values come one per image,
so that the caller can put an interval on their mean: see `mean_score`.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from improved_diffusion.data.decode import to_rgb
from improved_diffusion.errors import UserError
from improved_diffusion.metrics.inception.extractor import full_float32

Images = np.ndarray | Tensor | Sequence[Image.Image]  # uint8 (N, H, W, 3), or Pillow images of any sizes and modes
Processor = Callable[..., Any]


def clip_score(
    images: Images, texts: Sequence[str], model: nn.Module, processor: Processor, batch_size: int = 32
) -> Tensor:
    """CLIP score of each image with its own text (Hessel et al. 2021, arXiv:2104.08718): 100 max(cos, 0).

    The convention is torchmetrics': the weight of 2.5 in the paper's equation is not used, nor its prompt "A photo
    depicts" (the caller may put it before the texts). Negative cosines are cut image by image, as in the paper;
    torchmetrics cuts their mean.

    Args:
        images: N images.
        texts: N texts, the i-th of which belongs to image i.
        model: a CLIPModel, in evaluation mode; it stays on its device and in its dtype.
        processor: its CLIPProcessor.
        batch_size: images, and texts, per call of the model.

    Returns:
        float32 (N,) on the CPU, from 0 to 100; higher is better.

    Raises:
        UserError: no images, another number of texts, or embeddings that are not finite.
        ValueError: arguments of another kind, or a model in training mode.
    """
    return 100 * _prompt_match(images, texts, model, processor, batch_size).clamp(min=0)


def clip_i(images: Images, references: Images, model: nn.Module, processor: Processor, batch_size: int = 32) -> Tensor:
    """CLIP-I (Ruiz et al. 2022, DreamBooth, arXiv:2208.12242): the cosine of CLIP's image embeddings.

    Its mean is that over all pairs of an image and a reference. Of a set with itself, the pairs of an image with itself
    are among them.

    Args:
        images: N generated images.
        references: M real images of the same subject.
        model, processor, batch_size: see `clip_score`.

    Returns:
        float32 (N,) on the CPU: each image's mean over the references, from -1 to 1; higher is more alike.

    Raises:
        UserError: no images or no references, or embeddings that are not finite.
        ValueError: see `clip_score`.
    """
    return _fidelity(image_embeddings, images, references, model, processor, batch_size)


def dino(images: Images, references: Images, model: nn.Module, processor: Processor, batch_size: int = 32) -> Tensor:
    """DINO (Ruiz et al. 2022, DreamBooth, arXiv:2208.12242): `clip_i` with a self-supervised network's embeddings.

    Args:
        model: a ViTModel with DINO's weights (DreamBooth: ViT-S/16) or a Dinov2Model, in evaluation mode.
        processor: its image processor.
        images, references, batch_size: see `clip_i`.

    Returns, Raises:
        See `clip_i`.
    """
    return _fidelity(dino_embeddings, images, references, model, processor, batch_size)


def pick_score(
    images: Images, texts: Sequence[str], model: nn.Module, processor: Processor, batch_size: int = 32
) -> Tensor:
    """PickScore of each image with its own text (Kirstain et al. 2023, arXiv:2305.01569): scale times cosine.

    The scale is the exponential of the model's `logit_scale`, as the model learnt it (about 100). Some programs divide
    by 100; this one does not.

    Args:
        model: the CLIPModel that was tuned on Pick-a-Pic, in evaluation mode.
        images, texts, processor, batch_size: see `clip_score`.

    Returns:
        float32 (N,) on the CPU; higher is better. Only values of the same text can be compared.

    Raises:
        See `clip_score`.
    """
    return logit_scale(model) * _prompt_match(images, texts, model, processor, batch_size)


def pick_preferences(
    candidates: Images, text: str, model: nn.Module, processor: Processor, batch_size: int = 32
) -> Tensor:
    """Probability of each candidate to be the one preferred for `text`: softmax of their PickScores.

    Args:
        candidates: N images made for the one text.
        model, processor, batch_size: see `pick_score`.

    Returns:
        float32 (N,) on the CPU; they sum to 1.

    Raises:
        UserError: no candidates, or embeddings that are not finite.
        ValueError: see `clip_score`.
    """
    text_embedding = text_embeddings([text], model, processor)[0]
    return (logit_scale(model) * image_embeddings(candidates, model, processor, batch_size) @ text_embedding).softmax(0)


def _prompt_match(
    images: Images, texts: Sequence[str], model: nn.Module, processor: Processor, batch_size: int
) -> Tensor:
    check_images(images)
    _check_texts(texts)
    if len(images) != len(texts):
        raise UserError(f"there are {len(images):,} images and {len(texts):,} texts: each image needs its own text")
    embedded = image_embeddings(images, model, processor, batch_size)
    return prompt_match(embedded, text_embeddings(texts, model, processor, batch_size))


def _fidelity(embed: Callable[..., Tensor], images: Images, references: Images, *how: Any) -> Tensor:
    check_images(references, "references")
    return fidelity(embed(images, *how), embed(references, *how))


# ----------------------------------------------------------------------------------------------------------------------
# Scores of embeddings, each float32 (N, d) of length 1


def prompt_match(pictures: Tensor, texts: Tensor) -> Tensor:
    """CLIP-T (Ruiz et al. 2022, DreamBooth, section 4.1): the cosine of each picture with its own text, (N,)."""
    return (pictures * texts).sum(dim=1)


def fidelity(pictures: Tensor, references: Tensor) -> Tensor:
    """CLIP-I or DINO (same section): each picture's mean cosine with the M references, (N,)."""
    return pictures @ references.mean(dim=0)


def copying(pictures: Tensor, training: Tensor) -> Tensor:
    """How much closer each picture is to a training image than these are to each other, (N,), from 0 to 1.

        max(0, 1 - d / D),    d: cosine distance to the closest training image
                              D: median distance of a training image to the closest other one

    0 is as close as two training images are, or further; 1 is a copy. Give the training images as the autoencoder
    renders them, for a copy is no sharper.

    Raises:
        ValueError: fewer than two training images, which say nothing of how close is close.
    """
    if len(training) < 2:
        raise ValueError("a copy score needs at least two training images")
    among = 1 - training @ training.T
    among.fill_diagonal_(torch.inf)
    usual = among.min(dim=1).values.median().clamp(min=1e-6)  # the same image twice would leave no distance
    closest = 1 - (pictures @ training.T).max(dim=1).values
    return (1 - closest / usual).clamp(0, 1)


def drift(tuned: Tensor, base: Tensor) -> Tensor:
    """How far pictures of the same prompts and seeds have moved from those of the base: cosine distances, (N,)."""
    return (1 - prompt_match(tuned, base)).clamp(min=0)  # rounding aside, it is never below


# ----------------------------------------------------------------------------------------------------------------------
# Embeddings


def image_embeddings(images: Images, model: nn.Module, processor: Processor, batch_size: int = 32) -> Tensor:
    """CLIP's embeddings of N images, of length 1: float32 (N, d) on the CPU. Arguments and errors: see `clip_score`."""
    return _embed_images(
        images, model, processor, batch_size, lambda pixels: _projected(model.get_image_features(pixel_values=pixels))
    )


def dino_embeddings(images: Images, model: nn.Module, processor: Processor, batch_size: int = 32) -> Tensor:
    """The class token's last state for N images, scaled to length 1: float32 (N, d) on the CPU.

    It is taken after the last layer norm. The output that transformers calls `pooler_output` is not it: for ViTModel it
    has passed a layer that DINO never trained. Arguments and errors: see `dino`.
    """
    return _embed_images(
        images, model, processor, batch_size, lambda pixels: model(pixel_values=pixels).last_hidden_state[:, 0]
    )


@torch.inference_mode()
def text_embeddings(texts: Sequence[str], model: nn.Module, processor: Processor, batch_size: int = 32) -> Tensor:
    """CLIP's embeddings of N texts, of length 1: float32 (N, d) on the CPU. Arguments and errors: see `clip_score`.

    Texts are cut at the model's number of positions (77 tokens, the first and the last included), keeping the end
    token, whose state is the embedding. One warning says how many were.
    """
    _check_texts(texts)
    device = _check_model(model)[0]
    texts, positions = list(texts), model.config.text_config.max_position_embeddings
    lengths = [len(tokens) for tokens in processor(text=texts, truncation=False, verbose=False)["input_ids"]]
    if too_long := sum(length > positions for length in lengths):
        warnings.warn(
            f"{too_long:,} of {len(texts):,} texts are longer than the {positions} tokens that the model takes: "
            "what comes after them is not seen",
            stacklevel=3,
        )
    embeddings = []
    with full_float32(device):
        for batch in _batches(texts, batch_size):
            tokens = processor(text=batch, padding=True, truncation=True, max_length=positions, return_tensors="pt")
            inputs = {name: tokens[name].to(device) for name in ("input_ids", "attention_mask")}
            embeddings.append(_unit(_projected(model.get_text_features(**inputs)), "texts"))
    return torch.cat(embeddings)


@torch.inference_mode()
def _embed_images(
    images: Images, model: nn.Module, processor: Processor, batch_size: int, embed: Callable[[Tensor], Tensor]
) -> Tensor:
    check_images(images)
    device, dtype = _check_model(model)
    embeddings = []
    with full_float32(device):
        for batch in _batches(images, batch_size):
            # Processors guess the layout of an array and resize arrays and Pillow images differently: give one kind.
            pillow = [Image.fromarray(array) for array in rgb_arrays(batch)]
            pixels = processor(images=pillow, return_tensors="pt")["pixel_values"]
            embeddings.append(_unit(embed(pixels.to(device, dtype)), "images"))
    return torch.cat(embeddings)


def check_images(images: Images, name: str = "images") -> None:
    """Refuse what are no images; `name` is what messages call them.

    Raises:
        UserError: there are none.
        ValueError: neither uint8 (N, H, W, 3) nor a sequence of Pillow images.
    """
    if isinstance(images, Tensor | np.ndarray):
        if images.dtype not in (torch.uint8, np.uint8) or images.ndim != 4 or images.shape[-1] != 3:
            raise ValueError(f"{name} must be uint8 (N, H, W, 3), got {images.dtype} {tuple(images.shape)}")
    elif not isinstance(images, Sequence) or not all(isinstance(image, Image.Image) for image in images):
        raise ValueError(f"{name} must be a uint8 array (N, H, W, 3) or a list of Pillow images")
    if len(images) == 0:
        raise UserError(f"there are no {name} to measure")


def rgb_arrays(images: Images) -> list[np.ndarray]:
    """Each image as uint8 (H, W, 3); transparent Pillow images are composited on white."""
    if isinstance(images, Tensor):
        images = images.cpu().numpy()
    if isinstance(images, np.ndarray):
        return list(images)
    return [np.asarray(to_rgb(image)) for image in images]


def _batches(items: Any, batch_size: int) -> Iterator[Any]:
    if batch_size < 1:
        raise ValueError(f"the batch size must be positive, not {batch_size}")
    for start in range(0, len(items), batch_size):
        yield items[start : start + batch_size]


def _projected(output: Any) -> Tensor:
    """The embedding that transformers 4 returns as it is, and transformers 5 in an object."""
    return output if isinstance(output, Tensor) else output.pooler_output


def _unit(embeddings: Tensor, what: str) -> Tensor:
    embeddings = embeddings.float().cpu()
    if broken := int((~torch.isfinite(embeddings)).any(dim=1).sum()):
        raise UserError(
            f"{broken} of a batch of {len(embeddings)} embeddings of {what} hold a NaN or an infinity: use float32"
        )
    return F.normalize(embeddings, dim=1)


def logit_scale(model: nn.Module) -> float:
    """What a CLIPModel multiplies its cosines by, as it learnt it."""
    return model.logit_scale.detach().float().exp().item()


def _check_model(model: nn.Module) -> tuple[torch.device, torch.dtype]:
    """The model's device and dtype.

    Raises:
        ValueError: it is in training mode.
    """
    if model.training:
        raise ValueError("the model is in training mode, where dropout changes its output: call model.eval() before")
    parameter = next(model.parameters())
    return parameter.device, parameter.dtype


def _check_texts(texts: Sequence[str]) -> None:
    if isinstance(texts, str) or not all(isinstance(text, str) for text in texts):
        raise ValueError("texts must be a list of strings")
    if len(texts) == 0:
        raise UserError("there are no texts to measure")
