"""Memory of fine-tuning: what a step and a look take, what was estimated, and what Stable Diffusion and SDXL will need.

    python benchmarks/personalize_memory.py

First, one training step of tiny random models on the CPU in float32, on all weights of the UNet (DreamBooth) and with
LoRA, and a picture drawn after a step of LoRA: the tensors that stay and the most that PyTorch's allocator has given
out beside them, in MB (10^6), each with the estimate.

Then the estimates for the published architectures on a GPU, one image a step, LoRA of rank 16 on attention, bfloat16
but for what is trained and the autoencoder, looks as they are by default, in GB (10^9). First the parts of a step:
activations are what does not fit into the room of the gradients, which come when they go. Then the moments of a run
whole, each with 0.5 GB for what is not counted, and the largest of them. All of LoRA but the first have gradient
checkpointing. `fused`: Adafactor that updates in the backward pass, tiles and offload; `text`: the text encoders are
trained too; `prior`: DreamBooth, with an image of the class beside each; `float32`: as on a GPU that is slow at
bfloat16; `tiles`, `offload`, `nf4` and `int8`: with `training.vae_tiling`, `watch.offload` and `quantize`.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import runpy
import tempfile
import warnings
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # or the profiler says that it starts

import diffusers
import numpy as np
import torch
from accelerate import Accelerator
from diffusers import AutoencoderKL, StableDiffusionPipeline, StableDiffusionXLPipeline, UNet2DConditionModel
from PIL import Image
from torch.profiler import ProfilerActivity, profile
from transformers import (
    CLIPConfig,
    CLIPModel,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    ViTConfig,
    ViTModel,
)

from improved_diffusion.errors import user_errors_exit
from improved_diffusion.personalize.config import (
    AdapterConfig,
    ImagesConfig,
    PersonalizeConfig,
    PriorConfig,
    TrainingConfig,
    WatchConfig,
)
from improved_diffusion.personalize.data.captioned import open_captioned_set
from improved_diffusion.personalize.data.examples import Examples
from improved_diffusion.personalize.generate import Sampling, draw
from improved_diffusion.personalize.models.base import Base
from improved_diffusion.personalize.models.trained import needed_for_updates, prepare
from improved_diffusion.personalize.training.memory import MOMENTS, estimate_memory
from improved_diffusion.personalize.training.trainer import EncodedSet, Trainer

TINY = runpy.run_path(str(Path(__file__).parents[1] / "scripts" / "tiny_pipeline.py"))
WIDTH = 12  # of a column
TINY_RESOLUTION = 64  # four times what the tiny models are made for, so that activations count as they do in real ones

# Settings of the published models where they differ from the defaults of diffusers and transformers.
SD_UNET = {"sample_size": 64, "cross_attention_dim": 768}
SDXL_UNET = {
    "sample_size": 128,
    "block_out_channels": (320, 640, 1280),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "transformer_layers_per_block": (1, 2, 10),
    "attention_head_dim": (5, 10, 20),
    "cross_attention_dim": 2048,
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 6 * 256 + 1280,
}
VAE = {
    "block_out_channels": (128, 256, 512, 512),
    "layers_per_block": 2,
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
}
CLIP_L = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12}
OPENCLIP_G = {
    "hidden_size": 1280,
    "intermediate_size": 5120,
    "num_hidden_layers": 32,
    "num_attention_heads": 20,
    "projection_dim": 1280,
    "hidden_act": "gelu",
}


def published_base(kind: str) -> Base:
    """SD 1.5 (`sd`) or SDXL (`sdxl`) without weights, on the meta device."""
    make_tokenizer = TINY["make_tokenizer"]
    with torch.device("meta"):
        vae, text_encoder = AutoencoderKL(**VAE), CLIPTextModel(CLIPTextConfig(**CLIP_L))
        unet = UNet2DConditionModel(**(SDXL_UNET if kind == "sdxl" else SD_UNET))
        text_encoder_2 = CLIPTextModelWithProjection(CLIPTextConfig(**OPENCLIP_G))
    parts = {
        "unet": unet,
        "vae": vae,
        "text_encoder": text_encoder,
        "tokenizer": make_tokenizer("<|endoftext|>"),
        "scheduler": None,
    }
    if kind == "sdxl":
        parts |= {"text_encoder_2": text_encoder_2, "tokenizer_2": make_tokenizer("!")}
        return Base("SDXL", StableDiffusionXLPipeline(**parts))
    parts |= {"safety_checker": None, "feature_extractor": None}
    return Base("SD 1.5", StableDiffusionPipeline(**parts, requires_safety_checker=False))


def published_judges() -> dict[str, torch.nn.Module]:
    """CLIP of ViT-L/14 and DINO of ViT-S/16, without weights, on the meta device."""
    vision = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16}
    clip = CLIPConfig(text_config=CLIP_L, vision_config={**vision, "patch_size": 14}, projection_dim=768)
    dino = ViTConfig(hidden_size=384, intermediate_size=1536, num_attention_heads=6)
    with torch.device("meta"):
        return {"clip": CLIPModel(clip), "vision": ViTModel(dino, add_pooling_layer=False)}


def measure(base: Base, config: PersonalizeConfig) -> tuple[int, int]:
    """Bytes that a run on the CPU holds at the worst moments of its second step, for the first makes the moments of
    Adam, and of drawing a picture after it."""
    trained = prepare(base, config)
    with tempfile.TemporaryDirectory() as folder:
        Image.fromarray(np.zeros((64, 64, 3), np.uint8)).save(Path(folder) / "black.png")
        images = open_captioned_set(folder).images * config.training.batch_size
        resolution = config.images.resolution or base.resolution
        examples = Examples(base, images, [(resolution, resolution)] * len(images), config.images)
        source = EncodedSet(examples, [("a picture",)] * len(images))
        priors = {0: {(resolution, resolution): source}} if config.prior.images else {}
        trainer = Trainer(base, trained, config, source, priors, Accelerator(cpu=True, mixed_precision="no"))
        trainer.train_step()
        sampling = Sampling(1, config.watch.guidance_scale, height=resolution, width=resolution)
        step = bytes_that_stay(trainer, needed_for_updates(base, config)) + allocator_peak(trainer.train_step)
        peak = allocator_peak(lambda: list(draw(base, ["a dog"], [0], sampling)))
        return step, bytes_that_stay(trainer, list(base.networks)) + peak


def bytes_that_stay(trainer: Trainer, names: list[str]) -> int:
    """Of these components, which on a GPU would be there, and of what belongs to the parameters."""
    parts = [trainer.base.networks[name] for name in names]
    tensors = [tensor for part in parts for tensor in (*part.parameters(), *part.buffers())]
    tensors += [tensor for state in trainer.optimizer.state.values() for tensor in state.values()]
    if trainer.ema is not None:
        tensors += trainer.ema.weights(trainer.config.training.ema_rate).values()
    return sum(tensor.nbytes for tensor in tensors if isinstance(tensor, torch.Tensor))


def allocator_peak(run: Callable[[], object]) -> int:
    """The most bytes that PyTorch's CPU allocator has given out at once, of what it gives out during `run`."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        run()
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(trace))
        events = json.loads(trace.read_text())["traceEvents"]
    now = peak = 0
    for event in sorted((event for event in events if event.get("name") == "[memory]"), key=lambda event: event["ts"]):
        now += event["args"]["Bytes"]
        peak = max(peak, now)
    return peak


def compare_with_measurement() -> None:
    columns = ("full", "estimate", "LoRA", "estimate", "full / LoRA", "LoRA's look", "estimate")
    print(f"{'MB':24}" + "".join(f"{column:>{WIDTH}}" for column in columns))
    for kind, checkpointing in itertools.product(("sd", "sdxl"), (False, True)):
        steps = []
        for method in ("full", "lora"):
            config = PersonalizeConfig(
                method=method,
                images=ImagesConfig(resolution=TINY_RESOLUTION),
                training=TrainingConfig(steps=1, precision="float32", gradient_checkpointing=checkpointing),
            )
            base = Base(f"tiny {kind}", TINY["make_pipeline"](kind))
            estimate = estimate_memory(base, config, "float32")
            step, look = measure(base, config)
            steps += [step, estimate.step - estimate.allowance]
        cells = [*(f"{size / 1e6:.1f}" for size in steps), f"{steps[0] / steps[2]:.2f}"]
        cells += [f"{size / 1e6:.1f}" for size in (look, estimate.look - estimate.allowance)]
        name = f"tiny {kind}{', checkpointing' if checkpointing else ''}"
        print(f"{name:24}" + "".join(f"{cell:>{WIDTH}}" for cell in cells))


def published_runs() -> Iterator[tuple[str, PersonalizeConfig, str]]:
    """Names, settings and precisions."""
    training = TrainingConfig(steps=1)
    checkpointing = replace(training, gradient_checkpointing=True)
    fused = replace(checkpointing, optimizer="adafactor", fused_backward=True, grad_clip=None, vae_tiling=True)
    full = PersonalizeConfig(method="full", training=training)
    yield "full", full, "bf16"
    yield "full, checkpointing", replace(full, training=checkpointing), "bf16"
    yield "full, fused", replace(full, training=fused, watch=WatchConfig(offload=True)), "bf16"
    lora = PersonalizeConfig(adapter=AdapterConfig(rank=16, alpha=16), training=training)
    yield "lora", lora, "bf16"
    lora = replace(lora, training=checkpointing)
    yield "lora, checkpointing", lora, "bf16"
    yield "lora, text", replace(lora, train_text_encoder=True), "bf16"
    yield "lora, prior", replace(lora, prior=PriorConfig(200, prompt="a dog")), "bf16"
    yield "lora, float32", lora, "float32"
    tiled = replace(lora, training=replace(checkpointing, vae_tiling=True))
    yield "lora, tiles, offload", replace(tiled, watch=WatchConfig(offload=True)), "bf16"
    yield "lora, tiles, nf4", replace(tiled, quantize="nf4"), "bf16"
    yield "lora, tiles, int8", replace(tiled, quantize="int8"), "bf16"


def tabulate_published() -> None:
    columns = ("weights", "gradients", "optimizer", "activations", *MOMENTS, "most")
    counts = {name: sum(p.numel() for p in judge.parameters()) for name, judge in published_judges().items()}
    print("\njudges, in float32: " + ", ".join(f"{name} {n:,}" for name, n in counts.items()))
    judges = 4 * sum(counts.values())
    for base in map(published_base, ("sd", "sdxl")):
        counts = {name: sum(p.numel() for p in part.parameters()) for name, part in base.networks.items()}
        print(f"\n{base.name} at {base.resolution}: " + ", ".join(f"{name} {n:,}" for name, n in counts.items()))
        print(f"{'GB':22}" + "".join(f"{column:>{WIDTH}}" for column in columns))
        for name, config, precision in published_runs():
            estimate = estimate_memory(base, config, precision, judges)
            parts = estimate.parts("step")
            sizes = [parts[column] for column in columns[:4]]
            sizes += [*(sum(estimate.parts(moment).values()) for moment in MOMENTS), estimate.total]
            print(f"{name:22}" + "".join(f"{size / 1e9:{WIDTH}.2f}" for size in sizes), flush=True)


def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    warnings.simplefilter("ignore")
    diffusers.utils.logging.set_verbosity_error()
    compare_with_measurement()
    tabulate_published()


if __name__ == "__main__":
    with user_errors_exit():
        main()
