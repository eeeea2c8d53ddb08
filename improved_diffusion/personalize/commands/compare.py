"""How far are pictures of the same prompts and seeds from those of a reference: what does quantizing cost?

python personalize.py generate "a dog" --base BASE --out plain
python personalize.py generate "a dog" --base BASE --out int8 --quantize int8
python personalize.py compare plain int8 --lpips-weights alexnet-owt-7be5be79.pth
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

from improved_diffusion.errors import ArgumentParser


def run(arguments: list[str]) -> None:
    parser = ArgumentParser(prog="personalize.py compare", description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("reference", type=Path, metavar="REFERENCE", help="folder of generate")
    add("folders", nargs="+", type=Path, metavar="FOLDER", help="folders of generate, of the same prompts and seeds")
    add("--lpips-weights", type=Path, metavar="FILE", help="torchvision's AlexNet weights (default: without LPIPS)")
    add("--json", type=Path, metavar="FILE", help="write the results there as well")
    options = parser.parse_args(arguments)

    # Imported only now: torch takes seconds, and typos are answered at once.
    from improved_diffusion.files import write_text
    from improved_diffusion.metrics.pairs import load_lpips
    from improved_diffusion.personalize.studies.compare import compare, comparison_table

    network = load_lpips(options.lpips_weights) if options.lpips_weights is not None else None
    found = compare(options.reference, options.folders, network)
    print(comparison_table(options.reference, found))
    if options.json:
        write_text(options.json, json.dumps([dataclasses.asdict(one) for one in found], indent=2) + "\n")
