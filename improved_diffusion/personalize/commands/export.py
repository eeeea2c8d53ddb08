"""Write what a run trained for other programs, and verify the file by drawing with it.

python personalize.py export --run runs/dog --format kohya --out dog
python personalize.py export --run runs/dog --format kohya --save-precision fp16 --out dog
python personalize.py export --run runs/dog_full --format single-file --save-precision fp16 --out dog
python personalize.py export --base BASE --adapter kohya_lora.safetensors --format diffusers --out converted
"""

from __future__ import annotations

from pathlib import Path

from improved_diffusion.errors import ArgumentParser, UserError
from improved_diffusion.personalize.commands.options import add_model_options, open_model


def run(arguments: list[str]) -> None:
    parser = ArgumentParser(prog="personalize.py export", description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="folder of the file")
    parser.add_argument(
        "--format",
        choices=("diffusers", "kohya", "single-file"),
        default="diffusers",
        help="of an adapter, diffusers' form or kohya's, which ComfyUI and others read; of a whole model, diffusers' "
        "folder or a single file, which they read too (default: diffusers)",
    )
    parser.add_argument(
        "--save-precision",
        choices=("float32", "fp16", "bf16"),
        default="float32",
        help="of the numbers in the file (default: float32)",
    )
    parser.add_argument(
        "--no-verify",
        action="store_true",
        help="do not read the file back and compare a picture",
    )
    add_model_options(parser)
    options = parser.parse_args(arguments)

    if options.precision not in (None, "float32"):
        parser.error("export computes in float32: leave out --precision; --save-precision is that of the file")
    options.precision, options.device = "float32", options.device or "cpu"

    # Imported only now: torch takes seconds, and typos are answered at once.
    import numpy as np

    from improved_diffusion.checkpoint_file import read_checkpoint
    from improved_diffusion.personalize.models.adapters import adapted_parts
    from improved_diffusion.personalize.models.kohya_metadata import kohya_metadata
    from improved_diffusion.personalize.models.words import advice_to_readers, learned_rows
    from improved_diffusion.personalize.verify import export, known_picture, reread
    from improved_diffusion.run_directory import RunDirectory

    base, config = open_model(parser, options)
    word = config.subject.token
    about = None
    if options.format == "kohya" and adapted_parts(base):
        run = options.run and RunDirectory(options.run)
        step = read_checkpoint(run.choose_checkpoint(options.checkpoint))["step"] if run else None
        about = kohya_metadata(base, config if run else None, step)
    written = export(base, word, options.format, options.out, options.save_precision, about)
    advice = advice_to_readers(base) if learned_rows(base) else None
    if options.no_verify:
        print(f"{written}: not read back")
    else:
        expected, how = known_picture(base, word), (base.name, base.variant, base.text)
        del base  # before a second one is in memory
        drawn = known_picture(reread(written, *how, word), word)
        if difference := np.abs(drawn.astype(int) - expected).max():
            raise UserError(f"read back, {written} draws something else: a pixel differs by {difference}")
        print(f"{written}: read back, it draws the same picture; largest difference of a pixel: 0")
    if advice:
        print(f"note: {advice}")
