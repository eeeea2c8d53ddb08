"""Captions for images that have none, by BLIP, as text files beside them.

Li et al. 2022, "BLIP: Bootstrapping Language-Image Pre-training", arXiv:2201.12086.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from PIL import Image
from transformers import BlipForConditionalGeneration, BlipProcessor

from improved_diffusion.errors import UserError
from improved_diffusion.files import write_text
from improved_diffusion.personalize.data.captioned import METADATA, CaptionedImage, CaptionedSet, open_captioned_set

# That of the authors' demonstration (github.com/salesforce/BLIP). Nothing is sampled: captions can be repeated.
BEAM_SEARCH = {"do_sample": False, "num_beams": 3, "min_length": 5, "max_new_tokens": 20}


@torch.inference_mode()
def describe(
    images: Sequence[Image.Image], model: BlipForConditionalGeneration, processor: BlipProcessor, prefix: str = ""
) -> list[str]:
    """A caption for each image.

    Args:
        images: N of any sizes, RGB.
        model, processor: see `load_blip`.
        prefix: words that each caption starts with, and that the model goes on from.

    Returns:
        N texts of a line each, in lower case, as all that BLIP writes.
    """
    prompt = {"text": [prefix] * len(images)} if prefix else {}
    inputs = processor(images=list(images), return_tensors="pt", **prompt).to(model.device)
    captions = processor.batch_decode(model.generate(**inputs, **BEAM_SEARCH), skip_special_tokens=True)
    return [" ".join(caption.split()) for caption in captions]


def find_uncaptioned(folder: Path | str, overwrite: bool = False) -> tuple[CaptionedSet, list[CaptionedImage]]:
    """The images in a folder, and those among them to be captioned: with `overwrite` all, else those without a caption.

    Raises:
        UserError: no folder, or one of parquet files; captions that would not be seen, because metadata comes before
            them; two images that would share a text file; or what `open_captioned_set` raises.
    """
    folder = Path(folder)
    if folder.is_file() or any(folder.glob("*.parquet")):
        raise UserError(f"{folder}: captions can be written beside image files in a folder, not into a parquet file")
    metadata = next((folder / name for name in METADATA if (folder / name).is_file()), None)
    if overwrite and metadata:
        raise UserError(
            f"captions in text files would not be seen beside {metadata}, which comes before them: leave out "
            "--overwrite, or move it away"
        )
    found = open_captioned_set(folder)
    uncaptioned = [image for image in found.images if overwrite or image.caption is None]
    owners: dict[Path, str] = {}
    for image in uncaptioned:
        other = owners.setdefault(_text_file(folder, image), image.name)
        if other != image.name:
            raise UserError(f"in {folder}, {other} and {image.name} would share a caption's file: rename one of them")
    return found, uncaptioned


def write_captions(
    folder: Path,
    images: Sequence[CaptionedImage],
    model: BlipForConditionalGeneration,
    processor: BlipProcessor,
    prefix: str = "",
    batch_size: int = 8,
) -> Iterator[tuple[str, str]]:
    """Caption the images of a folder, `batch_size` at a time, and yield each one's name and caption once it is written.

    Raises:
        UserError: a file cannot be written.
    """
    for start in range(0, len(images), batch_size):
        batch = images[start : start + batch_size]
        captions = describe([image.load() for image in batch], model, processor, prefix)
        for image, caption in zip(batch, captions, strict=True):
            write_text(_text_file(folder, image), caption + "\n")
            yield image.name, caption


def _text_file(folder: Path, image: CaptionedImage) -> Path:
    return (folder / image.name).with_suffix(".txt")
