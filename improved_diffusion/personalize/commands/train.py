"""Fine-tune a base on images: LoRA, DreamBooth, textual inversion.

python personalize.py train --config configs/dog_dreambooth_lora.yaml --base BASE --data DIR --out runs/dog
python personalize.py train --resume runs/dog
accelerate launch personalize.py train ...     the same on several GPUs
"""

from __future__ import annotations

import sys
from pathlib import Path

from improved_diffusion.personalize.config import PersonalizeConfig
from improved_diffusion.run_flags import parse_run, run_parser


def run(arguments: list[str]) -> None:
    parser = run_parser(PersonalizeConfig, prog="personalize.py train", description=__doc__.splitlines()[0])
    options = parse_run(parser, arguments)

    # Imported only now: torch takes seconds, and typos are answered at once.
    from accelerate.utils import broadcast_object_list

    from improved_diffusion.personalize.training import start
    from improved_diffusion.training.start import (
        held_by_first,
        new_run,
        require_same_run,
        settings_and_run,
        state_to_resume,
    )

    given, resumed = settings_and_run(PersonalizeConfig, parser, arguments, options)
    config, why = start.with_precision(given)
    if resumed is not None:
        require_same_run(resumed.read_config(PersonalizeConfig), config, start.CHANGEABLE)
        opened = resumed.held()
    else:
        for part in config.parts:
            start.require_place(Path(options.out or "runs"), part.data)
        opened = new_run(options.out, f"{Path(config.data or 'data').name}-{config.method}")
    accelerator = start.start_accelerator(config)
    say = accelerator.print
    with held_by_first(opened, accelerator.is_main_process, lambda value: broadcast_object_list([value])[0]) as run:
        state = None if resumed is None else state_to_resume(run, options.resume, start.TRAINING_STATE)
        say(f"run: {run.path}" + (f", going on at update {state['step']}" if state else ""))
        say(f"arithmetic: {why}")
        loop = start.build(config, run, state, accelerator, say)
        finished = loop.train()
        say(f"done: {loop.trainer.counters}")
    if not finished:
        say(f"stopped; go on with: python personalize.py train --resume {run.path}")
        sys.exit(130)
    say(f"finished: {run.path}")
