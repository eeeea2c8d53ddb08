"""Learn to cut out from pictures with alpha, laid on backgrounds that are drawn.

python stickers.py segment train --data noto.zip fluent.zip --model segformer --steps 20000 --out runs/cutout
python stickers.py segment train --resume runs/cutout
"""

from __future__ import annotations

import argparse
import json
import sys

from improved_diffusion.run_flags import parse_run, run_parser
from improved_diffusion.stickers.segment.config import SegmentConfig

# Flags of which settings have long names, or several values.
SHORT = {"--model": "--model.kind", "--image-size": "--image_size", "--steps": "--training.steps"}
SEVERAL = ("--data", "--backgrounds")


def run(arguments: list[str]) -> None:
    parser = run_parser(
        SegmentConfig,
        prog="stickers.py segment train",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog=f"short for settings: {', '.join(f'{short} for {long}' for short, long in SHORT.items())}; "
        f"{' and '.join(SEVERAL)} take several paths",
    )
    arguments = in_full(arguments)
    options = parse_run(parser, arguments)

    # Imported only now: torch takes seconds, and typos are answered at once.
    import dataclasses

    from improved_diffusion.runtime.devices import usable_device
    from improved_diffusion.stickers.segment import start
    from improved_diffusion.stickers.segment.cutout import FILE, export, load_cutout
    from improved_diffusion.stickers.segment.models import sized_by_checkpoint
    from improved_diffusion.training.start import (
        new_run,
        require_same_learning_rates,
        require_same_run,
        require_steps_ahead,
        settings_and_run,
        state_to_resume,
    )

    config, resumed = settings_and_run(SegmentConfig, parser, arguments, options)
    if resumed is not None:
        before = resumed.read_config(SegmentConfig)
        require_same_run(before, config, start.CHANGEABLE)
        opened = resumed.held()
    else:
        config = dataclasses.replace(config, model=sized_by_checkpoint(config.model))
        opened = new_run(options.out, f"cutout-{config.model.kind}")
    with opened as run:
        state = None
        if resumed is not None:
            state = state_to_resume(run, options.resume, start.TRAINING_STATE)
            require_steps_ahead(config.training.steps, state["step"])
            require_same_learning_rates(before.training, config.training, state["step"])
        print(f"run: {run.path}" + (f", going on at step {state['step']}" if state else ""))
        loop = start.build(config, run, state, usable_device())
        (run.path / FILE).unlink(missing_ok=True)  # of fewer steps
        finished = loop.train()
        if finished:
            export(load_cutout(run.latest_checkpoint()), run.path / FILE)
    if not finished:
        print(f"stopped; go on with: python stickers.py segment train --resume {run.path}")
        sys.exit(130)
    print(f"finished: {run.path / FILE}")


def in_full(arguments: list[str]) -> list[str]:
    """The flags of SHORT as those of their settings, and the paths of SEVERAL as the lists that settings are."""
    finder = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    for flag in SEVERAL:
        finder.add_argument(flag, nargs="+")
    found, rest = finder.parse_known_args(arguments)
    paths = {flag: getattr(found, flag.removeprefix("--")) for flag in SEVERAL}
    lists = [f"{flag}={json.dumps(values)}" for flag, values in paths.items() if values]
    flags = (argument.partition("=") for argument in rest)
    return [SHORT.get(flag, flag) + equals + value for flag, equals, value in flags] + lists
