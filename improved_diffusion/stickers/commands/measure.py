"""Measure sets of stickers against a reference: Inception Score, FID, LPIPS, ERGAS; one table.

python stickers.py measure painted good bad trash --reference originals --features runs/vit
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

from improved_diffusion.errors import ArgumentParser
from improved_diffusion.stickers.commands.options import DEVICE

NETS = ("vgg", "alex", "squeeze")


def run(arguments: list[str]) -> None:
    parser = ArgumentParser(prog="stickers.py measure", description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("sets", nargs="+", type=Path, metavar="SET", help="folders of pictures")
    add("--reference", type=Path, required=True, metavar="SET", help="what they are compared with, by name where pairs")
    add("--features", default="inception", help="a ViT classifier, by folder or name, or inception (the default)")
    add("--weights", type=Path, metavar="FILE", help="Inception weights (default: cache, download or package)")
    add("--lpips-weights", type=Path, metavar="FILE", help="torchvision's weights of --lpips-net (default: no LPIPS)")
    add("--lpips-net", choices=NETS, default="vgg", help="(default: %(default)s)")
    add("--csv", type=Path, metavar="FILE", help="write the values there as well")
    add("--device", help=DEVICE)
    options = parser.parse_args(arguments)

    # Imported only now: torch takes seconds, and typos are answered at once.
    from improved_diffusion.metrics.pairs import load_lpips
    from improved_diffusion.personalize.data.captioned import open_captioned_set
    from improved_diffusion.results import write_csv
    from improved_diffusion.runtime.devices import usable_device
    from improved_diffusion.stickers import measure

    reference = open_captioned_set(options.reference)
    sets = [open_captioned_set(folder) for folder in options.sets]
    device = usable_device(options.device)
    extract = measure.open_extractor(options.features, device, options.weights)
    weights = options.lpips_weights
    network = None if weights is None else load_lpips(weights, options.lpips_net, device)
    measured, notes = measure.measure_sets(sets, reference, extract, network)
    print(measure.table(sets, measured))
    for note in notes:
        print(f"note: {note}")
    if options.csv is not None:
        rows = [
            {"set": str(pictures.path), "n": len(pictures), **dataclasses.asdict(value)}
            for pictures, values in zip(sets, measured, strict=True)
            for value in values
        ]
        write_csv(options.csv, rows)
