"""The embedded base, a small Stable Diffusion that draws stickers: its data, its network, and its measures.

    python scripts/sticker_base.py prepare data/noto-128.zip data/fluent-128.zip --taesd DIR --out data/sticker-base
    python personalize.py train --config configs/sticker_base.yaml --out runs/sticker-base
    python scripts/sticker_base.py export --run runs/sticker-base --out pretrained/stickers-128

The icons are rendered by `python -m improved_diffusion.data icons`. TAESD's weights are those of `madebyollin/taesd`.
"""

from __future__ import annotations

import hashlib
import json
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tiny_pipeline import PAD, SCHEDULE, clip_vocabulary, make_tokenizer, make_vae  # beside this file

from improved_diffusion.errors import ArgumentParser, UserError, user_errors_exit

SIDE = 128  # pixels
HELD_OUT = 10  # one in so many names
COMMON_MERGES = 4000  # of CLIP's tokens those that are most frequent anywhere, beside those of the icons' names
RARE = ("sks", "hta", "oue")  # tokens that stand for a new subject
TOKENS = 32  # of a prompt, with those of its start and end
WIDTH = 192  # of the text encoder's states


def wordings(row: dict[str, Any]) -> list[str]:
    """The texts that an icon is learned with."""
    return [row["text"], row["text"], row["name"], f"sticker of {row['name']}"]


def is_held_out(base: str) -> bool:
    """Whether icons of this base name are kept from training, in every set and tone."""
    return int(hashlib.sha256(base.encode()).hexdigest(), 16) % HELD_OUT == 0


def icons(path: Path) -> Iterator[tuple[dict[str, Any], bytes]]:
    """The icons of a zip of `python -m improved_diffusion.data icons`, without those that differ in skin alone."""
    try:
        with zipfile.ZipFile(path) as archive:
            for line in archive.read("metadata.jsonl").splitlines():
                row = json.loads(line)
                if "skin tone" not in row["name"]:
                    yield row, archive.read(row["file_name"])
    except (OSError, KeyError, ValueError, zipfile.BadZipFile) as error:
        raise UserError(f"{path} is no zip of `python -m improved_diffusion.data icons`: {error}") from error


def write_images(sets: list[Path], out: Path) -> list[str]:
    """Write the icons of `sets` into `out`/train and `out`/held-out, as personalize.py reads them. Returns texts."""
    rows: dict[str, list[dict[str, Any]]] = {"train": [], "held-out": []}
    for path in sets:
        for row, picture in icons(path):
            split = "held-out" if is_held_out(row["base"]) else "train"
            name = f"{row['style']}/{row['file_name']}"
            file = out / split / name
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(picture)
            rows[split].append({"file_name": name, "text": wordings(row)})
    for split, lines in rows.items():
        if not lines:
            raise UserError(f"none of the icons is for {split}: give more of them")
        (out / split / "metadata.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        print(f"{split}: {len(lines):,} icons")
    return [text for lines in rows.values() for line in lines for text in line["text"]]


def reduced_vocabulary(texts: list[str]) -> tuple[dict[str, int], list[str]]:
    """Of CLIP's tokens and merges the most frequent, and those that `texts` are made of: these are split as CLIP splits
    them, and other words into smaller pieces."""
    vocabulary, merges = clip_vocabulary()
    tokenizer = make_tokenizer(PAD["sd"], (vocabulary, merges))
    pairs = {"".join(merge.split()): merge.split() for merge in merges}
    needed = [token for text in {*texts, *RARE} for token in tokenizer.tokenize(text)]
    kept = {"".join(merge.split()) for merge in merges[:COMMON_MERGES]}
    while needed:
        token = needed.pop()
        if token in pairs and token not in kept:
            kept.add(token)
            needed += pairs[token]
    tokens = [token for token in vocabulary if token not in pairs or token in kept]
    return {token: number for number, token in enumerate(tokens)}, [m for m in merges if "".join(m.split()) in kept]


def make_base(texts: list[str], taesd: Path, seed: int = 0):
    """A random StableDiffusionPipeline but for TAESD, of a size that one core trains in hours."""
    import torch
    from diffusers import DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    torch.manual_seed(seed)
    tokenizer = make_tokenizer(PAD["sd"], reduced_vocabulary(texts), TOKENS)
    text_encoder = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=WIDTH,
            intermediate_size=4 * WIDTH,
            projection_dim=WIDTH,
            num_hidden_layers=3,
            num_attention_heads=4,
            max_position_embeddings=TOKENS,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )
    unet = UNet2DConditionModel(
        sample_size=SIDE // 8,
        block_out_channels=(64, 128, 160),
        layers_per_block=1,
        norm_num_groups=16,
        attention_head_dim=4,
        cross_attention_dim=WIDTH,
        use_linear_projection=True,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    )
    # A schedule that ends in pure noise (Lin et al. 2023, arXiv:2305.08891): icons are mostly white.
    scheduler = DDIMScheduler(
        **SCHEDULE,
        prediction_type="v_prediction",
        rescale_betas_zero_snr=True,
        timestep_spacing="trailing",
        clip_sample=False,
    )
    unchecked = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
    vae = make_vae("sd", taesd)
    parts = {"vae": vae, "text_encoder": text_encoder, "tokenizer": tokenizer, "unet": unet, "scheduler": scheduler}
    return StableDiffusionPipeline(**parts, **unchecked)


def prepare(options) -> None:
    if options.out.exists():
        raise UserError(f"{options.out} exists already: choose another --out, or remove it")
    pipeline = make_base(write_images(options.icons, options.out), options.taesd)
    pipeline.save_pretrained(options.out / "base")
    for name in ("unet", "text_encoder"):
        count = sum(parameter.numel() for parameter in getattr(pipeline, name).parameters())
        print(f"{name}: {count:,} parameters")
    print(f"a random base in {options.out / 'base'}")


def export(options) -> None:
    """Write what a run trained as a pipeline of half precision, in files of at most 15 MB."""
    import torch

    from improved_diffusion.personalize.models.tuned import load_run
    from improved_diffusion.run_directory import RunDirectory

    tuned = load_run(RunDirectory(options.run), "latest")
    pipeline = tuned.base.pipeline.to(torch.float16)
    pipeline.save_pretrained(options.out, max_shard_size="15MB")
    print(f"update {tuned.step:,} of {options.run} in {options.out}")


def main() -> None:
    parser = ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    command = commands.add_parser("prepare", help="images to learn from, images held out, and a random base")
    command.set_defaults(run_command=prepare)
    command.add_argument("icons", type=Path, nargs="+", help="zips of `python -m improved_diffusion.data icons`")
    command.add_argument("--taesd", type=Path, required=True, help="folder with taesd_encoder.safetensors and the like")
    command.add_argument("--out", type=Path, required=True, help="a new folder")
    command = commands.add_parser("export", help="what a run trained, as a pipeline in half precision")
    command.set_defaults(run_command=export)
    command.add_argument("--run", type=Path, required=True, help="run of personalize.py")
    command.add_argument("--out", type=Path, required=True, help="folder of the pipeline")
    options = parser.parse_args()
    options.run_command(options)


if __name__ == "__main__":
    with user_errors_exit():
        main()
