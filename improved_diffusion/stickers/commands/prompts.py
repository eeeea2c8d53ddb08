"""Find the prompt by which CLIP score and PickScore tell good pictures from bad ones best.

python stickers.py prompts painted good bad trash --out search
"""

from __future__ import annotations

from pathlib import Path

from improved_diffusion.errors import ArgumentParser
from improved_diffusion.personalize.config import CLIP
from improved_diffusion.stickers.commands.options import DEVICE, usable_device_of

PICKSCORE = "yuvalkirstain/PickScore_v1"


def run(arguments: list[str]) -> None:
    parser = ArgumentParser(prog="stickers.py prompts", description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("sets", nargs="+", type=Path, metavar="SET", help="folders of pictures, the best first")
    add("--out", type=Path, required=True, metavar="DIR", help="folder of the results; an interrupted search goes on")
    add("--prompts", type=Path, metavar="FILE", help="one on each line (default: the 200 that ship)")
    add("--clip", default=CLIP, help="CLIP model, by name or folder (default: %(default)s)")
    add("--pick", default=PICKSCORE, help="PickScore's model, by name or folder, or none (default: %(default)s)")
    add("--device", help=DEVICE)
    options = parser.parse_args(arguments)

    # Imported only now: torch takes seconds, and typos are answered at once.
    from improved_diffusion.stickers.prompts import scoring
    from improved_diffusion.stickers.prompts.ranking import rank
    from improved_diffusion.stickers.prompts.report import table, write_report
    from improved_diffusion.stickers.prompts.templates import read_prompts, shipped_prompts

    prompts = read_prompts(options.prompts) if options.prompts is not None else shipped_prompts()
    sets = scoring.open_sets(options.sets)
    pick = None if options.pick == "none" else options.pick
    scorers = scoring.open_scorers(options.clip, pick, usable_device_of(options))
    scores = {scorer.name: scoring.score_sets(scorer, sets, prompts, options.out) for scorer in scorers}
    ranked = rank(prompts, scores)
    names = [group.name for group in sets]
    write_report(ranked, names, options.out)
    print(table(ranked, names))
    print(f"all {len(prompts)} prompts: {options.out / 'prompts.csv'}, prompts.md and prompts.png beside it")
