"""From texts and images to what the UNet works on, and back."""

from __future__ import annotations

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from improved_diffusion.personalize.models.base import Base


def encode_texts(base: Base, texts: list[str]) -> dict[str, Tensor]:
    """What the UNet is told of N texts.

    Returns:
        `states`, (N, 77, width): the last layer's states of SD's encoder; of SDXL's two, those of the layer before the
        last, side by side. `pooled`, (N, width), of SDXL's second encoder; not for SD.
    """
    states, conditions = [], {}
    for tokenizer, encoder in zip(base.tokenizers, base.text_encoders.values(), strict=True):
        tokens = tokenizer(
            # A learned word of several embeddings is written out as several.
            [base.pipeline.maybe_convert_prompt(text, tokenizer) for text in texts],
            padding="max_length",
            max_length=tokenizer.model_max_length,
            truncation=True,
            return_tensors="pt",
        )
        output = encoder(tokens.input_ids.to(encoder.device), output_hidden_states=base.is_sdxl)
        if base.is_sdxl:
            states.append(output.hidden_states[-2])
            conditions["pooled"] = output[0]  # of the last encoder: the projected state of the end token
        else:
            states.append(output[0])
    return {"states": torch.cat(states, dim=-1), **conditions}


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
