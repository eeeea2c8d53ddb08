"""The embedded base, a small Stable Diffusion that draws stickers: its data, its network, and what to measure of it.

    python scripts/sticker_base.py prepare data/noto.zip data/fluent.zip --taesd DIR --out data/sticker-base
    python personalize.py train --config configs/sticker_base.yaml --out runs/sticker-base
    python scripts/sticker_base.py export --run runs/sticker-base --out pretrained/stickers-128
    python scripts/sticker_base.py draw data/noto.zip data/fluent.zip --base pretrained/stickers-128 --out runs/base
    python scripts/sticker_base.py style data/twemoji.zip --n 20 --out data/twemoji-20

The icons are rendered by `python -m improved_diffusion.data icons`. TAESD's weights are those of `madebyollin/taesd`.
"""

from __future__ import annotations

import hashlib
import json
import zipfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from tiny_pipeline import PAD, SCHEDULE, clip_vocabulary, make_tokenizer, make_vae  # beside this file

from improved_diffusion.errors import ArgumentParser, UserError, user_errors_exit
from improved_diffusion.personalize.commands.options import add_model_options, open_model
from improved_diffusion.settings import require

SIDE = 128  # pixels
SPLITS = ("train", "held-out")
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


def split_of(row: dict[str, Any]) -> str:
    return "held-out" if is_held_out(row["base"]) else "train"


def category_of(row: dict[str, Any]) -> str:
    return Path(row["file_name"]).parts[0]


def write_images(rows: Iterable[tuple[dict[str, Any], bytes]], out: Path) -> list[str]:
    """Write icons into the folder `out`, as personalize.py reads them, and return all their texts."""
    lines = []
    for row, picture in rows:
        name = f"{row['style']}/{row['file_name']}"
        file = out / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(picture)
        lines.append({"file_name": name, "text": wordings(row)})
    if not lines:
        raise UserError(f"none of the icons is for {out}: give more of them")
    (out / "metadata.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    print(f"{out}: {len(lines):,} icons")
    return [text for line in lines for text in line["text"]]


def write_splits(sets: list[Path], out: Path) -> list[str]:
    """Write the icons of `sets` into `out`/train and `out`/held-out; returns their texts."""
    found = [icon for path in sets for icon in icons(path)]
    texts = []
    for split in SPLITS:
        texts += write_images((icon for icon in found if split_of(icon[0]) == split), out / split)
    return texts


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


def require_new(out: Path) -> None:
    if out.exists():
        raise UserError(f"{out} exists already: choose another --out, or remove it")


def prepare(options) -> None:
    require_new(options.out)
    pipeline = make_base(write_splits(options.icons, options.out), options.taesd)
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


def draw(options) -> None:
    """Draw a picture for each name that was held out, beside the icons themselves: folders by category."""
    from improved_diffusion.personalize.generate import Sampling
    from improved_diffusion.personalize.pictures import draw_missing

    require_new(options.out / "real")
    base, config = open_model(options.parser, options)
    found = [icon for path in options.icons for icon in icons(path)]
    measured = {category_of(row) for row, _ in found if is_held_out(row["base"])}  # of others there is nothing to draw
    files, texts = [], []
    for row, picture in found:
        if category_of(row) not in measured:
            continue
        name = f"{category_of(row)}/{row['style']}-{Path(row['file_name']).name}"
        real = options.out / "real" / split_of(row) / name
        real.parent.mkdir(parents=True, exist_ok=True)
        real.write_bytes(picture)
        if is_held_out(row["base"]):
            files.append(options.out / "drawn" / name)
            files[-1].parent.mkdir(parents=True, exist_ok=True)
            texts.append(row["text"])
    sampling = Sampling(options.steps, options.guidance_scale, height=SIDE, width=SIDE)
    draw_missing(base, files, config.prompts(texts), range(len(files)), sampling, description="drawing")
    print(
        f"{len(files):,} pictures in {options.out / 'drawn'}, icons of these names in {options.out / 'real/held-out'}"
    )


def style(options) -> None:
    """Write some icons of a set, spread over it, of names that were not held out: a style to learn."""
    require(options.n >= 1, f"--n must be at least 1, not {options.n}")
    require_new(options.out)
    found = [icon for icon in icons(options.icons) if split_of(icon[0]) == "train"]
    write_images(found[:: max(1, len(found) // options.n)][: options.n], options.out)


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
    command = commands.add_parser("draw", help="pictures to measure, of the names that were held out")
    command.set_defaults(run_command=draw, parser=command)
    command.add_argument("icons", type=Path, nargs="+", help="zips of `python -m improved_diffusion.data icons`")
    command.add_argument("--out", type=Path, required=True, help="folder of the folders drawn/ and real/")
    command.add_argument("--steps", type=int, default=25, help="sampling steps (default: %(default)s)")
    command.add_argument("--guidance-scale", type=float, default=4.0, help="(default: %(default)s)")
    add_model_options(command)
    command = commands.add_parser("style", help="a few icons of a set, to fine-tune on")
    command.set_defaults(run_command=style)
    command.add_argument("icons", type=Path, help="zip of `python -m improved_diffusion.data icons`")
    command.add_argument("--n", type=int, default=20, help="icons (default: %(default)s)")
    command.add_argument("--out", type=Path, required=True, help="a new folder")
    options = parser.parse_args()
    options.run_command(options)


if __name__ == "__main__":
    with user_errors_exit():
        main()
