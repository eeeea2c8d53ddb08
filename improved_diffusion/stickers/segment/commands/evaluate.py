"""Measure cut-outs on held-out pictures and styles, side by side.

python stickers.py segment evaluate runs/segformer runs/unet --data noto.zip fluent.zip twemoji.zip --out results
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from improved_diffusion.errors import ArgumentParser
from improved_diffusion.settings import require

if TYPE_CHECKING:
    from improved_diffusion.stickers.segment import Cutout


def run(arguments: list[str]) -> None:
    parser = ArgumentParser(prog="stickers.py segment evaluate", description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("cutouts", nargs="+", metavar="RUN", help="runs, checkpoints or .safetensors files")
    add("--data", nargs="+", metavar="SET", help="pictures with alpha (default: what the first was trained on)")
    add("--backgrounds", nargs="+", default=[], metavar="SET", help="photographs to lay them on, beside drawn ones")
    add("--pictures", type=int, default=400, help="of each set at most, one of each held-out name (default: 400)")
    add("--size", type=int, help="pixels a side of the pictures (default: the largest trained at)")
    add("--seed", type=int, default=0, help="of what is drawn of them (default: 0)")
    add("--out", type=Path, metavar="DIR", help="write table.md, scores.json and masks.png there")
    add("--device", help="cpu, cuda, cuda:1 ... (default: cuda if there is one)")
    options = parser.parse_args(arguments)
    for name in ("pictures", "size"):
        value = getattr(options, name)
        require(value is None or value >= 1, f"--{name} must be at least 1, not {value}")
    require(options.seed >= 0, f"--seed must not be negative, not {options.seed}")

    # Imported only now: torch takes seconds, and typos are answered at once.
    import json
    from dataclasses import asdict

    from improved_diffusion.files import write_text
    from improved_diffusion.sampling.grids import save_png
    from improved_diffusion.stickers.segment.cutout import load_cutout
    from improved_diffusion.stickers.segment.evaluation import compare, draw_held_out, sheet, table
    from improved_diffusion.stickers.segment.pictures import Photographs, open_pictures

    models = {_name(path, options.cutouts): load_cutout(path, options.device) for path in options.cutouts}
    configs = [model.config for model in models.values()]
    shares = {config.held_out for config in configs}
    require(len(shares) == 1, f"these runs hold out different shares of the names, {shares}: evaluate each alone")
    paths = options.data or list(configs[0].data)
    size = options.size or max(config.image_size for config in configs)
    photographs = Photographs(tuple(options.backgrounds))
    sets, unseen = {}, {}
    for path in paths:
        _, held_out = open_pictures(path).split(configs[0].held_out)
        sets[_name(path, paths)] = draw_held_out(held_out, photographs, options.pictures, size, options.seed)
        unseen[_name(path, paths)] = not any(Path(path).name == Path(data).name for c in configs for data in c.data)
    scores, differences = compare(models, sets, unseen)
    trained = [_training(name, model) for name, model in models.items()]
    text = "\n\n".join((table(scores), "\n".join(trained), *(["\n".join(differences)] if differences else [])))
    print(text)
    if options.out is not None:
        write_text(options.out / "table.md", text + "\n")
        result = {"scores": [asdict(score) for score in scores], "models": trained, "differences": differences}
        write_text(options.out / "scores.json", json.dumps(result, indent=2) + "\n")
        save_png(sheet(models, sets), options.out / "masks.png")


def _training(name: str, cutout: Cutout) -> str:
    """What went into a cut-out, in a line."""
    parameters = sum(parameter.numel() for parameter in cutout.network.parameters())
    return (
        f"{name}: {cutout.config.model.kind}, {parameters / 1e6:.2f} M parameters, {cutout.images_seen:,} images in "
        f"{cutout.seconds / 60:.1f} minutes"
    )


def _name(path: str, paths: list[str]) -> str:
    """What a path is called in a table: its last part, if no other's is the same."""
    short = Path(path).stem
    return short if sum(Path(other).stem == short for other in paths) == 1 else path
