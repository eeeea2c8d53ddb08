"""Measure generated pictures: do they follow their prompts, look like the real ones, copy them?

python personalize.py evaluate snow --references photos/dog
"""

from __future__ import annotations

import dataclasses
import json
import warnings
from pathlib import Path

from improved_diffusion.errors import ArgumentParser, UserError
from improved_diffusion.personalize.config import CLIP, DINO

# As in studies/evaluate.py, which a test compares; importing that takes seconds.
METRICS = ("clip-t", "clip-i", "likeness", "copying", "lpips", "kid", "fid", "inception-score")
DEFAULT = ("clip-t", "clip-i", "likeness", "copying", "kid", "fid")


def run(arguments: list[str]) -> None:
    parser = ArgumentParser(prog="personalize.py evaluate", description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("generated", type=Path, metavar="GENERATED", help="folder of pictures, with their prompts as captions")
    add("--references", type=Path, help="the real pictures: a folder or a parquet file")
    add(
        "--tokens",
        nargs="+",
        default=(),
        metavar="TOKEN",
        help="rare tokens in the captions, which CLIP is not to read",
    )
    add("--metrics", nargs="+", choices=METRICS, default=DEFAULT, metavar="METRIC", help=" ".join(METRICS))
    add("--clip", default=CLIP, help="CLIP model, by name or folder (default: %(default)s)")
    add(
        "--vision",
        default=DINO,
        help="of likeness and copying: DINO, by name or folder, or inception (default: %(default)s)",
    )
    add("--weights", type=Path, metavar="FILE", help="Inception weights (default: cache, download or package)")
    add("--lpips-weights", type=Path, help="torchvision's AlexNet weights, for lpips")
    add("--json", type=Path, metavar="FILE", help="write the results there as well")
    add("--device", help="cpu, cuda, cuda:1 ... (default: cuda if there is one)")
    options = parser.parse_args(arguments)

    # Imported only now: torch takes seconds, and typos are answered at once.
    from improved_diffusion.files import write_text
    from improved_diffusion.metrics.report import table
    from improved_diffusion.personalize.data.captioned import open_captioned_set
    from improved_diffusion.personalize.measuring.judge import Judge
    from improved_diffusion.personalize.studies import evaluate
    from improved_diffusion.runtime.devices import usable_device

    warnings.formatwarning = lambda message, *_, **__: f"warning: {message}\n"
    device = usable_device(options.device)
    generated = open_captioned_set(options.generated)
    references = open_captioned_set(options.references) if options.references is not None else None
    chosen = [metric for metric in METRICS if metric in options.metrics]
    similar = [metric for metric in chosen if metric in evaluate.SIMILARITY_METRICS]
    by_clip = {"clip-t", "clip-i"} & set(similar)
    by_vision = {"likeness", "copying"} & set(similar)
    clip, vision = options.clip if by_clip else None, options.vision if by_vision else None
    judge = Judge(clip, vision, device, inception_weights=options.weights)
    found, measurements = [], []
    similarities = evaluate.Similarities(generated, references, judge, options.tokens, options.lpips_weights, device)
    refused = evaluate.each(similar, lambda metric: found.append(similarities.measure(metric)))
    refused += evaluate.each(
        [metric for metric in chosen if metric in evaluate.INCEPTION_METRICS],
        lambda metric: measurements.extend(
            evaluate.measure_inception([metric], generated, references, str(device), options.weights)
        ),
    )
    if measurements:
        print(table(measurements))
    if found:
        print(evaluate.similarity_table(found))
    if options.json:
        records = [m.as_dict() for m in measurements] + [dataclasses.asdict(similarity) for similarity in found]
        write_text(options.json, json.dumps(records, indent=2) + "\n")
    if refused:
        raise UserError("; ".join(refused))
