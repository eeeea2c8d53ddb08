"""From texts and images to what the UNet works on, and back."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from improved_diffusion.personalize.models.base import Base

CHUNK = 75  # tokens that a text encoder reads at a time, beside those of start and end


def encode_texts(base: Base, texts: list[str]) -> dict[str, Tensor]:
    """What the UNet is told of N texts, read as `base.text` says.

    Returns:
        `states`, (N, 2 + max_token_length, width): the last layer's states of SD's encoder; of SDXL's two, those of the
        layer before the last, side by side; or of earlier layers. `pooled`, (N, width), of SDXL's second encoder; not
        for SD.
    """
    states, conditions = [], {}
    skip, chunks = base.text.clip_skip, base.text.max_token_length // CHUNK
    for tokenizer, encoder in zip(base.tokenizers, base.text_encoders.values(), strict=True):
        # A learned word of several embeddings is written out as several.
        written = [base.pipeline.maybe_convert_prompt(text, tokenizer) for text in texts]
        tokens = tokens_in_chunks(tokenizer, written, chunks).to(encoder.device)
        output = encoder(tokens.flatten(0, 1), output_hidden_states=base.is_sdxl or skip > 1)
        if base.is_sdxl:
            of_chunks = output.hidden_states[-1 - skip]
            # Of the last encoder: the projected state of the end token, that of the first chunk.
            conditions["pooled"] = output[0][::chunks]
        elif skip > 1:
            of_chunks = encoder.text_model.final_layer_norm(output.hidden_states[-skip])
        else:
            of_chunks = output[0]
        states.append(of_chunks if chunks == 1 else _joined(of_chunks.unflatten(0, (-1, chunks))))
    return {"states": torch.cat(states, dim=-1), **conditions}


def tokens_in_chunks(tokenizer: Any, texts: list[str], chunks: int) -> Tensor:
    """Token numbers of N texts, (N, chunks, 77): each chunk has a start and an end of its own, and what is left of it
    is padded, as if it were a text by itself (the form of kohya's scripts, library/strategy_sd.py)."""
    length = tokenizer.model_max_length
    room = length - 2
    read = tokenizer(texts, add_special_tokens=False, truncation=True, max_length=chunks * room).input_ids
    rows = torch.full((len(texts), chunks, length), tokenizer.pad_token_id)
    for row, numbers in zip(rows, read, strict=True):
        for chunk, first in zip(row, range(0, chunks * room, room), strict=True):
            filled = [tokenizer.bos_token_id, *numbers[first : first + room], tokenizer.eos_token_id]
            chunk[: len(filled)] = torch.tensor(filled)
    return rows


def _joined(states: Tensor) -> Tensor:
    """Of the states of chunks, (N, chunks, 77, width), those of the texts, (N, 2 + chunks * 75, width): of the tokens
    of start only the first, and of those at the end only the last, as in kohya's scripts."""
    inner = states[:, :, 1:-1].flatten(1, 2)
    return torch.cat([states[:, 0, :1], inner, states[:, -1, -1:]], dim=1)


@torch.no_grad()
def encode_prompts(base: Base, prompts: list[str], negative_prompt: str, guided: bool) -> dict[str, Tensor]:
    """N prompts, and what to be guided away from where they are `guided`, as the pipelines take them.

    Both are read alike; the pipelines' own `clip_skip` leaves the negative prompt as it is.
    """
    encoded = {"": encode_texts(base, prompts)}
    if guided and base.is_sdxl and not negative_prompt and base.pipeline.config.force_zeros_for_empty_prompt:
        # For SDXL none at all and an empty one are not the same.
        encoded["negative_"] = {name: torch.zeros_like(tensor) for name, tensor in encoded[""].items()}
    elif guided:
        encoded["negative_"] = encode_texts(base, [negative_prompt] * len(prompts))
    names = {"states": "prompt_embeds", "pooled": "pooled_prompt_embeds"}
    return {f"{sign}{names[name]}": tensor for sign, found in encoded.items() for name, tensor in found.items()}


@torch.no_grad()
def latent_moments(base: Base, pixels: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of the autoencoder's distribution for images (N, 3, H, W) on [-1, 1].

    Returns:
        Two of float32 (N, 4, H / 8, W / 8), on the scale that the UNet knows. The deviation of an AutoencoderTiny is 0.
    """
    vae = base.pipeline.vae
    output = vae.encode(pixels.to(base.device, vae.dtype))
    if hasattr(output, "latent_dist"):
        mean, std = output.latent_dist.mean, output.latent_dist.std
    else:  # an AutoencoderTiny has no distribution
        mean, std = output.latents, torch.zeros_like(output.latents)
    return mean.float() * vae.config.scaling_factor, std.float() * vae.config.scaling_factor


def rendered(base: Base, picture: Image.Image) -> Image.Image:
    """A picture, its sides multiples of 8, as the autoencoder renders it: the best that the base could draw of it."""
    pixels = torch.from_numpy(np.asarray(picture.convert("RGB"), dtype=np.float32) / 127.5 - 1).permute(2, 0, 1)
    return decode_latents(base, latent_moments(base, pixels[None])[0])[0]


@torch.no_grad()
def decode_latents(base: Base, latents: Tensor) -> list[Image.Image]:
    """Latents (N, 4, H / 8, W / 8) to N pictures, in the autoencoder's own arithmetic; one by one, for decoding takes
    more memory than all else."""
    vae, pictures = base.pipeline.vae, []
    for latent in latents.to(vae.dtype).split(1):
        decoded = vae.decode(latent / vae.config.scaling_factor).sample
        pictures += base.pipeline.image_processor.postprocess(decoded.float(), output_type="pil")
    return pictures
