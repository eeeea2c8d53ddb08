"""Find the prompt that tells good stickers from bad ones best, or that draws the best, by CLIP score and PickScore.

python stickers.py prompts painted good bad trash --out search
python stickers.py prompts --run runs/stickers --out search
"""

from __future__ import annotations

import argparse
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING

from improved_diffusion.errors import ArgumentParser
from improved_diffusion.personalize.commands.options import add_model_options, open_model
from improved_diffusion.personalize.config import CLIP

if TYPE_CHECKING:
    from improved_diffusion.stickers.prompts.scoring import Scorer

PICKSCORE = "yuvalkirstain/PickScore_v1"
JUDGE = "a telegram sticker"  # the best of the published search


def run(arguments: list[str]) -> None:
    parser = ArgumentParser(prog="stickers.py prompts", description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("sets", nargs="*", type=Path, metavar="SET", help="folders of pictures, the best first")
    add("--out", type=Path, required=True, metavar="DIR", help="folder of the results; an interrupted search goes on")
    add("--prompts", type=Path, metavar="FILE", help="one on each line (default: the 200 that ship)")
    add("--clip", default=CLIP, help="CLIP model, by name or folder (default: %(default)s)")
    add("--pick", default=PICKSCORE, help="PickScore's model, by name or folder, or none (default: %(default)s)")
    add("--judge", default=JUDGE, metavar="TEXT", help='what drawn pictures are to show (default: "%(default)s")')
    add("--steps", type=int, default=30, help="sampling steps of drawn pictures (default: %(default)s)")
    add_model_options(parser)
    options = parser.parse_args(arguments)
    draws = options.run is not None or options.base is not None
    if draws == bool(options.sets):
        parser.error("give sets of pictures to tell apart, or --run or --base to draw some with each prompt")

    # Imported only now: torch takes seconds, and typos are answered at once.
    from improved_diffusion.personalize.measuring.prompts import read_prompts
    from improved_diffusion.stickers.prompts.templates import shipped_prompts

    prompts = read_prompts(options.prompts) if options.prompts is not None else shipped_prompts()
    (_draw if draws else _tell_apart)(parser, options, prompts)
    print(f"all {len(prompts)} prompts: {options.out / 'prompts.csv'}; prompts.md and prompts.png are beside it")


def _open_scorers(options: argparse.Namespace) -> list[Scorer]:
    from improved_diffusion.runtime.devices import usable_device
    from improved_diffusion.stickers.prompts.scoring import open_scorers

    return open_scorers(options.clip, None if options.pick == "none" else options.pick, usable_device(options.device))


def _tell_apart(parser: ArgumentParser, options: argparse.Namespace, prompts: list[str]) -> None:
    from improved_diffusion.stickers.prompts.ranking import rank
    from improved_diffusion.stickers.prompts.report import table, write_report
    from improved_diffusion.stickers.prompts.scoring import open_sets, score_sets

    sets = open_sets(options.sets)
    scores = {scorer.name: score_sets(scorer, sets, prompts, options.out) for scorer in _open_scorers(options)}
    ranked = rank(prompts, scores)
    names = [group.name for group in sets]
    write_report(ranked, names, options.out)
    print(table(ranked, names))


def _draw(parser: ArgumentParser, options: argparse.Namespace, prompts: list[str]) -> None:
    import numpy as np

    from improved_diffusion.personalize.generate import Sampling
    from improved_diffusion.personalize.models.trained import resolution_of
    from improved_diffusion.personalize.pictures import draw_missing, model_settings
    from improved_diffusion.results import claim
    from improved_diffusion.stickers.prompts.halving import ROUNDS, halve
    from improved_diffusion.stickers.prompts.report import standings_table, write_first_pictures, write_standings
    from improved_diffusion.stickers.prompts.scoring import score_sets, set_of_files

    scorers = _open_scorers(options)
    base, config = open_model(parser, options)
    side = resolution_of(config, base)
    sampling = Sampling(options.steps, height=side, width=side)
    settings = {"steps": options.steps, "side": side, **model_settings(base, (1.0,), options.adapter)}
    claim(options.out / "manifest.json", settings, "choose another --out")
    texts = {prompt: config.subject.fill(prompt) for prompt in prompts}

    def files(prompt: str, seeds: int) -> list[Path]:
        folder = options.out / "pictures" / sha256(texts[prompt].encode()).hexdigest()[:16]
        return [folder / f"{seed:04d}.png" for seed in range(seeds)]

    def score(some: list[str], seeds: int) -> dict[str, np.ndarray]:
        wanted = [(file, texts[prompt], seed) for prompt in some for seed, file in enumerate(files(prompt, seeds))]
        draw_missing(base, *zip(*wanted, strict=True), sampling, description=f"{len(some)} prompts x {seeds}")
        sets = [set_of_files(prompt, files(prompt, seeds)) for prompt in some]
        scores = {scorer.name: score_sets(scorer, sets, [options.judge], options.out) for scorer in scorers}
        return {name: np.stack([group[:, 0] for group in groups]) for name, groups in scores.items()}

    standings = halve(prompts, score)
    write_standings(standings, options.out)
    write_first_pictures({s.prompt: files(s.prompt, s.pictures) for s in standings[: ROUNDS[-1][0]]}, options.out)
    print(standings_table(standings))
