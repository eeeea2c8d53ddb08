"""A random Stable Diffusion or SDXL pipeline of a few hundred thousand parameters, to try the tools without weights.

    python scripts/tiny_pipeline.py sd --out data/tiny-sd
    python scripts/tiny_pipeline.py sd2 --out data/tiny-sd2
    python scripts/tiny_pipeline.py sdxl --out data/tiny-sdxl [--taesd DIR]

Everything is as in the real pipelines but smaller: the classes, the names of the modules, CLIP's own vocabulary (from
the package open_clip_torch, installed with `pip install --no-deps open_clip_torch`), and what the published configs of
SD 1.5, SD 2.1 and SDXL 1.0 say, the oddities among it. What it draws is noise. With `--taesd` the autoencoder is TAESD
of that folder, real and small, so that real images pass through real latents.
"""

from __future__ import annotations

import gzip
import importlib.util
import json
import tempfile
from pathlib import Path

from improved_diffusion.errors import ArgumentParser, UserError, user_errors_exit

VOCABULARY = "bpe_simple_vocab_16e6.txt.gz"
PAD = {"sd": "<|endoftext|>", "sd2": "!", "sdxl": "<|endoftext|>", "sdxl, second": "!"}
TEXT_ENCODERS = {
    "sd": {"hidden_size": 32, "projection_dim": 32, "num_hidden_layers": 3, "hidden_act": "quick_gelu"},
    # Its last layer is left out for good, and its states are wider than its projection.
    "sd2": {"hidden_size": 32, "projection_dim": 16, "num_hidden_layers": 2, "hidden_act": "gelu"},
    "sdxl": {"hidden_size": 32, "projection_dim": 32, "num_hidden_layers": 3, "hidden_act": "quick_gelu"},
    "sdxl, second": {"hidden_size": 48, "projection_dim": 48, "num_hidden_layers": 4, "hidden_act": "gelu"},
}
# Written before transformers knew better: they are not CLIP's, whose tokens of start and end are 49406 and 49407.
TOKEN_IDS = {"bos_token_id": 0, "eos_token_id": 2, "pad_token_id": 1}
SCHEDULE = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "steps_offset": 1}


def clip_vocabulary() -> tuple[dict[str, int], list[str]]:
    """CLIP's tokens with their numbers, and its merges in order.

    Raises:
        UserError: the package that carries them is not installed.
    """
    spec = importlib.util.find_spec("open_clip")
    file = Path(spec.origin).with_name(VOCABULARY) if spec and spec.origin else None
    if file is None or not file.is_file():
        raise UserError("CLIP's vocabulary is not installed: pip install --no-deps open_clip_torch")
    lines = gzip.decompress(file.read_bytes()).decode("utf-8").split("\n")
    merges = lines[1 : 49152 - 256 - 2 + 1]
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    letters = [chr(byte) for byte in printable] + [chr(256 + i) for i in range(256 - len(printable))]
    tokens = [*letters, *(letter + "</w>" for letter in letters), *("".join(merge.split()) for merge in merges)]
    tokens += ["<|startoftext|>", "<|endoftext|>"]
    return {token: number for number, token in enumerate(tokens)}, merges


def make_tokenizer(pad_token: str, words: tuple[dict[str, int], list[str]] | None = None, length: int = 77):
    """CLIP's tokenizer, with its vocabulary and merges or with other `words`, for texts of at most `length` tokens with
    those of their start and end."""
    from transformers import CLIPTokenizer

    vocabulary, merges = words or clip_vocabulary()
    with tempfile.TemporaryDirectory() as folder:
        files = Path(folder) / "vocab.json", Path(folder) / "merges.txt"
        files[0].write_text(json.dumps(vocabulary), encoding="utf-8")
        files[1].write_text("#version: 0.2\n" + "\n".join(merges) + "\n", encoding="utf-8")
        (Path(folder) / "tokenizer_config.json").write_text(
            json.dumps({"tokenizer_class": "CLIPTokenizer", "model_max_length": length, "pad_token": pad_token})
        )
        return CLIPTokenizer.from_pretrained(folder)


def make_text_encoder(kind: str, vocabulary: int):
    """CLIP's text model, as a key of TEXT_ENCODERS names it, for so many tokens; SDXL's second one has a projection."""
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    model = CLIPTextModelWithProjection if kind == "sdxl, second" else CLIPTextModel
    sizes = {"intermediate_size": 64, "num_attention_heads": 4, "vocab_size": vocabulary}
    return model(CLIPTextConfig(**TEXT_ENCODERS[kind], **sizes, **TOKEN_IDS))


def make_vae(kind: str, taesd: Path | None):
    from diffusers import AutoencoderKL, AutoencoderTiny

    if taesd is None:
        of_sdxl = {"scaling_factor": 0.13025, "force_upcast": True} if kind == "sdxl" else {}
        return AutoencoderKL(
            block_out_channels=(32, 64),
            down_block_types=("DownEncoderBlock2D",) * 2,
            up_block_types=("UpDecoderBlock2D",) * 2,
            latent_channels=4,
            sample_size=64,
            **of_sdxl,
        )
    from safetensors.torch import load_file

    name = "taesdxl" if kind == "sdxl" else "taesd"
    vae = AutoencoderTiny()
    try:
        for part, module in (("encoder", vae.encoder), ("decoder", vae.decoder)):
            state = load_file(taesd / f"{name}_{part}.safetensors")
            # The original decoder starts with a clamp, which has no parameters and shifts the numbers of the layers.
            shift = 1 if part == "decoder" else 0
            names = {key: key.split(".", 1) for key in state}
            renamed = {f"layers.{int(first) - shift}.{rest}": state[key] for key, (first, rest) in names.items()}
            module.load_state_dict(renamed)
    except (OSError, RuntimeError, ValueError) as error:
        raise UserError(f"{taesd} has no weights of {name}: {' '.join(str(error).split())[:200]}") from error
    return vae


def make_scheduler(kind: str):
    """That of the published pipeline; what a class does not know of its config, it passes over."""
    from diffusers import DDIMScheduler, EulerDiscreteScheduler, PNDMScheduler

    schedule = {**SCHEDULE, "clip_sample": False, "set_alpha_to_one": False, "skip_prk_steps": True}
    if kind == "sd":
        return PNDMScheduler.from_config(schedule)
    if kind == "sd2":
        return DDIMScheduler.from_config({**schedule, "prediction_type": "v_prediction"})
    return EulerDiscreteScheduler.from_config({**schedule, "timestep_spacing": "leading"})


def make_unet(kind: str):
    from diffusers import UNet2DConditionModel

    widths = {name: encoder["hidden_size"] for name, encoder in TEXT_ENCODERS.items()}
    settings = {
        "sd": {"cross_attention_dim": widths["sd"]},
        "sd2": {
            "cross_attention_dim": widths["sd2"],
            "use_linear_projection": True,
            "upcast_attention": True,
        },
        "sdxl": {
            "cross_attention_dim": widths["sdxl"] + widths["sdxl, second"],
            "use_linear_projection": True,
            "transformer_layers_per_block": (1, 2),
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": 8,
            "projection_class_embeddings_input_dim": 6 * 8 + widths["sdxl, second"],
        },
    }
    return UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(32, 64),
        layers_per_block=1,
        norm_num_groups=16,
        attention_head_dim=(2, 4),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        **settings[kind],
    )


def make_pipeline(kind: str, taesd: Path | None = None, seed: int = 0):
    """A StableDiffusionPipeline or StableDiffusionXLPipeline, random but for what `taesd` names."""
    import torch
    from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline

    torch.manual_seed(seed)
    tokenizer = make_tokenizer(PAD[kind])
    parts = {
        "vae": make_vae(kind, taesd),
        "text_encoder": make_text_encoder(kind, len(tokenizer)),
        "tokenizer": tokenizer,
        "scheduler": make_scheduler(kind),
    }
    if kind == "sdxl":
        second = "sdxl, second"
        text_encoder = make_text_encoder(second, len(tokenizer))
        parts |= {"text_encoder_2": text_encoder, "tokenizer_2": make_tokenizer(PAD[second])}
        return StableDiffusionXLPipeline(**parts, unet=make_unet(kind))
    unchecked = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
    return StableDiffusionPipeline(**parts, unet=make_unet(kind), **unchecked)


def main() -> None:
    parser = ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("kind", choices=("sd", "sd2", "sdxl"), help="of SD 1, SD 2 or SDXL")
    parser.add_argument("--out", type=Path, required=True, help="folder of the pipeline")
    parser.add_argument("--taesd", type=Path, help="folder with taesd_encoder.safetensors and the like")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    make_pipeline(options.kind, options.taesd, options.seed).save_pretrained(options.out)
    print(f"a tiny {options.kind} in {options.out}")


if __name__ == "__main__":
    with user_errors_exit():
        main()
