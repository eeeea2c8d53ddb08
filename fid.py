"""Measure a set of images against another: FID and its kin, each with an interval that says how certain it is.

python fid.py REAL FAKE [--features 64] [--json FILE]
python fid.py data/food101-64/test runs/hybrid               images are generated, as many of each class as REAL has
python fid.py REAL FAKE --metrics fid kid precision-recall per-class --plot metrics.png
python fid.py REAL FAKE --train data/food101-64 --metrics fid floor memorisation --pairs closest.png
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import warnings
from pathlib import Path

from improved_diffusion.errors import ArgumentParser, UserError, user_errors_exit
from improved_diffusion.files import write_text
from improved_diffusion.sampling.flags import EMA_LENGTH_HELP, add_sampling_flags, flag_changes, split_guide

OF_TRAINING_IMAGES = ["floor", "memorisation", "class-accuracy"]
METRICS = [  # as improved_diffusion.metrics.METRICS, which a test compares; importing that takes seconds
    *("fid", "fid-infinity", "sfid", "kid", "precision-recall", "density-coverage", "per-class", "inception-score"),
    *OF_TRAINING_IMAGES,
]
PICTURES = (".png", ".pdf", ".svg")
OUTPUTS = {  # option -> endings that its file may have, and metrics of which it needs one
    "plot": (PICTURES, {"fid-infinity", "precision-recall", "density-coverage", "per-class"}),
    "pairs": (PICTURES, {"memorisation"}),
    "save_statistics": ((".npz",), set()),
}


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = ArgumentParser(
        description=__doc__.splitlines()[0],
        epilog="REAL and FAKE are each an image folder, a zip of images, a packed set, an .npy or .npz of uint8 images "
        "(N, H, W, 3), an .npz of saved statistics (mu, sigma), or a run directory, checkpoint or exported model, "
        "whose images are generated. Features are kept in "
        "$IMPROVED_DIFFUSION_CACHE or ~/.cache/improved_diffusion, so an interrupted command goes on where it stopped.",
    )
    parser.add_argument("real", metavar="REAL", type=Path, help="reference images")
    parser.add_argument("fake", metavar="FAKE", type=Path, help="images to measure")
    add = parser.add_argument
    add("--metrics", nargs="+", default=["fid"], choices=METRICS, metavar="METRIC", help=" ".join(METRICS))
    add("--features", type=int, default=2048, choices=(64, 192, 768, 2048), help="size (default: %(default)s)")
    add(
        "--train", type=Path, metavar="PATH", help=f"what the model was trained on, for {', '.join(OF_TRAINING_IMAGES)}"
    )
    add("--n", type=int, help="measure with at most so many images of each side, drawn evenly over the classes")
    add("--preprocessing", default="tf1", choices=("tf1", "clean", "none"), help="resize (default: %(default)s)")
    add("--fast", action="store_true", help="features in bfloat16: another measurement, not to be mixed with others")
    add("--confidence", type=float, default=0.95, help="of the intervals (default: %(default)s)")
    add("--seed", type=int, default=0, help="of subsets, partitions and intervals")
    add("--json", type=Path, metavar="FILE", help="write the results there as well")
    add("--plot", type=Path, metavar="FILE", help="draw FID against n, precision and recall, the classes")
    add("--pairs", type=Path, metavar="FILE", help="with memorisation: draw the closest pairs")
    add("--save-statistics", type=Path, metavar="FILE", help="write REAL's mean and covariance: an .npz of mu, sigma")
    add("--weights", type=Path, metavar="PATH", help="Inception weights (default: cache, download or package)")
    add("--batch-size", type=int, help="images per network call (default: what suits the device)")
    add("--per-class", type=int, help="images that a run generates (default: as many as REAL has)")
    add("--checkpoint", help="of a run: best, latest or step_0015000.pt (default: best, or else latest)")
    add("--ema", type=float, metavar="RATE", help="of a run: which moving average of its weights (default: the first)")
    add("--ema-length", type=float, metavar="SIGMA_REL", help=f"of a run: {EMA_LENGTH_HELP}")
    add("--generation-seed", type=int, default=1, help="of a run's images (default: %(default)s)")
    add_sampling_flags(parser)
    add("--device", help="cpu, cuda, cuda:1 ... (default: cuda if there is one)")
    options = parser.parse_args(arguments)
    check(parser, options)
    return options


def check(parser: ArgumentParser, options: argparse.Namespace) -> None:
    """Refuse at once what would only fail after the work."""
    options.metrics = list(dict.fromkeys(options.metrics))
    for name, least in {"batch_size": 1, "n": 2, "seed": 0, "generation_seed": 0}.items():
        value = getattr(options, name)
        if value is not None and value < least:
            parser.error(f"--{name.replace('_', '-')} is {value}: it must be at least {least}")
    if not 0 < options.confidence < 1:
        parser.error(f"--confidence is {options.confidence}: it must lie between 0 and 1")
    for name, (endings, needed) in OUTPUTS.items():
        file = getattr(options, name)
        if file is not None and file.suffix.lower() not in endings:
            parser.error(f"--{name.replace('_', '-')} {file}: the name must end in {' or '.join(endings)}")
        if file is not None and needed and not needed & set(options.metrics):
            parser.error(f"--{name} draws {', '.join(sorted(needed))}: measure one with --metrics")
    if not options.train and (needed := set(OF_TRAINING_IMAGES) & set(options.metrics)):
        parser.error(f"{min(needed)} needs the images that the model was trained on: give them with --train")


def require_model(options: argparse.Namespace) -> None:
    """Raise UserError for flags that say how a model draws, where there is none to draw."""
    from improved_diffusion.sampling.loading import is_model

    if is_model(options.real) or is_model(options.fake):
        return
    of_model = {name: getattr(options, name) for name in ("per_class", "checkpoint", "ema", "ema_length", "guide")}
    of_model |= flag_changes(options)
    if given := [name.replace("_", "-") for name, value in of_model.items() if value is not None]:
        sides = f"neither {options.real} nor {options.fake} is one"
        raise UserError(f"{', '.join(given)}: these say what a run or a model draws, and {sides}")


def main() -> None:
    options = parse_arguments()
    warnings.formatwarning = lambda message, *_, **__: f"warning: {message}\n"

    # Imported only now: torch takes seconds, and --help should not.
    from improved_diffusion import load
    from improved_diffusion.metrics.fid import statistics
    from improved_diffusion.metrics.report import plot, plot_pairs, table
    from improved_diffusion.provenance import project_version
    from improved_diffusion.runtime.devices import start_processes, usable_device
    from improved_diffusion.sampling.identity import selection_line
    from improved_diffusion.sampling.measuring import Drawn, Extraction, open_sets

    require_model(options)
    with start_processes() as processes:
        if options.device is not None:
            processes = dataclasses.replace(processes, device=usable_device(options.device))
        guide = load(*split_guide(options.guide), device=processes.device) if options.guide else None
        opened = open_sets(
            *(options.real, options.fake, options.metrics, options.features),
            processes=processes,
            train=options.train,
            n=options.n,
            seed=options.seed,
            drawn=Drawn(
                *(options.per_class, options.checkpoint, options.ema, options.generation_seed, guide),
                changes=flag_changes(options),
                ema_length=options.ema_length,
            ),
            extraction=Extraction(options.weights, options.preprocessing, options.fast, options.batch_size),
            always=options.save_statistics is not None,
        )
        if not processes.is_first:
            return
    results, refused = [], []
    for metric in options.metrics:  # one by one: what one of them refuses, the others may still measure
        try:
            results += opened.measure(metric, options.confidence, options.seed)
        except UserError as error:
            refused.append(str(error))
    if results:
        print(table(results))
    for line in filter(None, map(selection_line, opened.identities.values())):
        print(line)
    if options.json and results:
        records = [result.as_dict() for result in results]
        report = {**records[0], "measurements": records, **opened.identities, "improved_diffusion": project_version()}
        write_text(options.json, json.dumps(report, indent=2) + "\n")
    if options.plot:
        plot(results, options.plot)
    for result in results:
        if options.pairs and result.metric == "memorisation":
            plot_pairs(result, opened.fake_source, opened.train_source, options.pairs)
    if options.save_statistics:
        statistics(opened.sets.real[opened.features]).save(options.save_statistics)
    if refused:
        raise UserError("; ".join(refused))


if __name__ == "__main__":
    with user_errors_exit():
        main()
