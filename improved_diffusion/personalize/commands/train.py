"""Fine-tune a base on images: LoRA, DreamBooth, textual inversion.

python personalize.py train --config configs/dog_dreambooth_lora.yaml --base BASE --data DIR --out runs/dog
python personalize.py train --resume runs/dog
accelerate launch personalize.py train ...     the same on several GPUs
"""

from __future__ import annotations

import sys
from pathlib import Path

from improved_diffusion.errors import UserError
from improved_diffusion.personalize.config import PersonalizeConfig
from improved_diffusion.settings import parse_arguments, read_settings, settings_parser, to_settings


def run(arguments: list[str]) -> None:
    parser = settings_parser(PersonalizeConfig, prog="personalize.py train", description=__doc__.splitlines()[0])
    parser.add_argument("--config", help="YAML file of settings")
    parser.add_argument("--out", help="directory of the run (default: a new one under runs/)")
    parser.add_argument("--resume", help="directory of a run to go on with, or one of its checkpoints")
    options = parse_arguments(parser, arguments)
    if options.resume is not None and (options.config or options.out):
        raise UserError("--resume takes the settings and the directory of its run: leave out --config and --out")

    # Imported only now: torch takes seconds, and typos are answered at once.
    from accelerate.utils import broadcast_object_list

    from improved_diffusion.personalize.training import start
    from improved_diffusion.training.start import new_run, open_run, require_same_run

    state, settings, source = None, {}, ""
    if options.resume is not None:
        run, state = open_run(options.resume, PersonalizeConfig, start.TRAINING_STATE)
        settings, source = read_settings(run.config_file), str(run.config_file)
    elif options.config is not None:
        settings, source = read_settings(options.config), options.config
    config = to_settings(PersonalizeConfig, parser, parse_arguments(parser, arguments, settings, source))
    if state is not None:
        require_same_run(run.read_config(PersonalizeConfig), config, start.CHANGEABLE)
    else:
        start.require_place(Path(options.out or "runs"), config.data)
    accelerator = start.start_accelerator(config)
    if state is None:
        name = f"{Path(config.data or 'data').name}-{config.method}"
        run = new_run(options.out, name, lambda path: broadcast_object_list([path])[0])
    say = accelerator.print
    say(f"run: {run.path}" + (f", going on at update {state['step']}" if state else ""))
    loop = start.build(config, run, state, accelerator, say)
    finished = loop.train()
    say(f"done: {loop.trainer.counters}")
    if not finished:
        say(f"stopped; go on with: python personalize.py train --resume {run.path}")
        sys.exit(130)
    say(f"finished: {run.path}")
