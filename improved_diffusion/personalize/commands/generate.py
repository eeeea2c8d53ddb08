"""Draw pictures with a base, tuned or not.

python personalize.py generate "a {token} {class} in the snow" --run runs/dog --out snow --n 4
python personalize.py generate --prompts prompts.txt --adapters runs/dog:0.8 style.safetensors:0.5 --out both
python personalize.py generate "a sticker" --base BASE --adapter lora.safetensors --image photo.jpg --out stickers
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

from improved_diffusion.errors import ArgumentParser, UserError
from improved_diffusion.personalize.commands.options import (
    add_model_options,
    add_scale_options,
    open_model,
    open_stack,
    where,
)


def run(arguments: list[str]) -> None:
    parser = ArgumentParser(prog="personalize.py generate", description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("texts", nargs="*", metavar="PROMPT", help="texts; {token} and {class} stand for the run's subject")
    add("--prompts", type=Path, metavar="FILE", help="a text file of prompts, one on each line, after those given here")
    add("--out", type=Path, required=True, help="folder of the pictures; a contact sheet OUT.png comes beside it")
    add("--n", type=int, default=4, help="pictures for each prompt (default: %(default)s)")
    add("--seed", type=int, default=0, help="picture number i of a prompt is drawn from SEED + i (default: 0)")
    add("--steps", type=int, default=30, help="sampling steps (default: %(default)s)")
    add("--guidance-scale", type=float, default=7.5, help="classifier-free guidance (default: %(default)s)")
    add("--negative-prompt", default="", help="what the pictures should not be")
    add("--height", type=int, help="pixels (default: the run's, or what the base was made for)")
    add("--width", type=int, help="pixels (default: the run's, or what the base was made for)")
    add(
        "--sampler",
        choices=("ddim", "euler", "euler_a", "dpmpp_2m", "unipc"),
        help="how the steps are taken (default: as the base's own settings say)",
    )
    add("--image", type=Path, help="a picture to start from (image-to-image)")
    add("--strength", type=float, default=0.6, help="with --image: 0 leaves it, 1 forgets it (default: %(default)s)")
    add("--batch-size", type=int, default=4, help="pictures at once on a GPU; changes speed, memory and last digits")
    add("--quantize", choices=("nf4", "int8", "fp8"), help="hold the UNet in few bits; `compare` says what that costs")
    add("--offload", action="store_true", help="keep on the GPU only the part that is at work: slower, less memory")
    add("--vae-tiling", action="store_true", help="decode in tiles of 512 pixels: less memory, a little other pictures")
    add_model_options(parser)
    add(
        "--adapters",
        nargs="+",
        metavar="FILE_OR_RUN[:WEIGHT]",
        help="several at once, in place of --adapter or --run, of --base or else the first run's; a weight is 1 unless "
        "given",
    )
    add_scale_options(parser)
    options = parser.parse_intermixed_args(arguments)
    for name in ("n", "batch_size"):
        if getattr(options, name) < 1:
            parser.error(f"--{name.replace('_', '-')} must be at least 1, not {getattr(options, name)}")
    if not 0 <= options.seed < 2**62:
        parser.error(f"--seed must be from 0 to 2^62, not {options.seed}")

    # Imported only now: torch takes seconds, and typos are answered at once.
    from improved_diffusion.files import file_sha256, write_text
    from improved_diffusion.personalize.data.captioned import MANIFEST, load_image
    from improved_diffusion.personalize.generate import Sampling
    from improved_diffusion.personalize.measuring.prompts import read_prompts
    from improved_diffusion.personalize.measuring.sheet import contact_sheet
    from improved_diffusion.personalize.models.adapters import set_scales
    from improved_diffusion.personalize.models.quantize import LIBRARIES, quantize, require_library
    from improved_diffusion.personalize.models.stack import Stacked
    from improved_diffusion.personalize.models.trained import resolution_of
    from improved_diffusion.personalize.pictures import draw_missing, model_settings
    from improved_diffusion.results import claim, holds_something
    from improved_diffusion.sampling.grids import save_png

    if options.quantize is not None:
        require_library(LIBRARIES[options.quantize])
    how = (options.steps, options.guidance_scale, options.negative_prompt)
    sampling = Sampling(*how, options.height, options.width, options.strength, options.sampler)
    texts = [*options.texts, *(read_prompts(options.prompts) if options.prompts is not None else ())]
    if not texts:
        parser.error("what to draw? give texts, or --prompts FILE")
    start = load_image(options.image) if options.image is not None else None
    manifest = options.out / MANIFEST
    if not manifest.is_file() and holds_something(options.out):
        raise UserError(f"{options.out} is not empty: choose another --out")
    stack = [Stacked.parse(text) for text in options.adapters or ()]
    device, _ = where(options)
    on_cpu = options.offload or options.quantize is not None  # until the weights are few
    if stack:
        base, config = open_stack(parser, options, stack, on_cpu)
    else:
        base, config = open_model(parser, options, on_cpu)
    side = resolution_of(config, base)
    sampling = dataclasses.replace(sampling, height=options.height or side, width=options.width or side)
    scales = (options.unet_scale, options.text_encoder_scale, options.text_encoder_2_scale)
    if not stack:
        set_scales(base, *scales)
    prompts = config.prompts(texts)
    request = {
        "prompts": prompts,
        "n": options.n,
        "seed": options.seed,
        **dataclasses.asdict(sampling),
        "quantize": options.quantize,
        "vae_tiling": options.vae_tiling or None,  # as in folders that do not know of it
        "image": file_sha256(options.image) if options.image is not None else None,
        **model_settings(base, scales, options.adapter),
    }
    if stack:
        request["adapters"] = [[adapter.fingerprint(), adapter.weight] for adapter in stack]
    claim(manifest, request, "choose another --out")
    if options.quantize is not None:
        quantize(base.unet, options.quantize)
    if options.vae_tiling:
        base.tile_vae()
    if options.offload:
        base.pipeline.enable_model_cpu_offload(device=device)
    else:
        base.place(device)
    wanted = [prompt for prompt in prompts for _ in range(options.n)]
    seeds = [options.seed + i for i in range(options.n)] * len(prompts)
    files = [options.out / f"{number:04d}.png" for number in range(len(wanted))]
    drawn = draw_missing(base, files, wanted, seeds, sampling, options.batch_size, start, "drawing")
    records = [
        {"file_name": file.name, "text": text, "seed": seed}
        for file, text, seed in zip(files, wanted, seeds, strict=True)
    ]
    write_text(options.out / "metadata.jsonl", "".join(json.dumps(record) + "\n" for record in records))
    pictures = [load_image(file) for file in files]
    rows = [pictures[i : i + options.n] for i in range(0, len(pictures), options.n)]
    sheet = options.out.with_name(f"{options.out.name}.png")
    save_png(contact_sheet(rows, prompts, [f"seed {seed}" for seed in seeds[: options.n]]), sheet)
    kept = f" ({len(files) - drawn} were there)" if drawn < len(files) else ""
    print(f"{len(pictures)} pictures in {options.out}{kept}, all on {sheet}")
