"""Train a diffusion model.

python train.py --loss hybrid                      the demo, or Food101 where it is prepared and there is a GPU
python train.py --config FILE --data DIR --out DIR [--training.lr 1e-4 ...]
python train.py --resume runs/NAME                 go on with an interrupted run
torchrun --nproc-per-node 8 train.py ...           the same on several GPUs; on several machines: docs/scaling.md
"""

from __future__ import annotations

import contextlib
import sys
from pathlib import Path

from improved_diffusion.errors import UserError, user_errors_exit
from improved_diffusion.run_flags import parse_run, run_parser, run_type_of_flags
from improved_diffusion.settings import parse_arguments, read_settings, to_settings


def main(arguments: list[str]) -> int:
    kind = run_type_of_flags(arguments)
    of_config = "YAML file of settings (default: chosen by data and device, and printed)"
    parser = run_parser(kind, of_config, prog="train.py", description=__doc__.splitlines()[0])
    again = "go on with the run at --out, as it was begun, if there is one: so a start and all restarts are one command"
    parser.add_argument("--resume-if-exists", action="store_true", help=again)
    options = parse_run(parser, arguments)
    if options.resume_if_exists and (options.resume or not options.out):
        raise UserError("--resume-if-exists goes on with the run at --out: give --out, and leave out --resume")

    # Only now, for torch takes seconds to import: --help and typos are answered at once.
    from improved_diffusion.data.shards import open_training_set
    from improved_diffusion.runtime.devices import start_processes
    from improved_diffusion.training import start
    from improved_diffusion.training.evaluation import Evaluator
    from improved_diffusion.training.loop import TrainingLoop
    from improved_diffusion.training.trainer import Trainer

    with start_processes() as processes, contextlib.ExitStack() as stack:
        say = print if processes.is_first else lambda *_, **__: None

        def hold(run):
            of_first = start.held_by_first(run, processes.is_first, lambda value: processes.gather(value)[0])
            return stack.enter_context(of_first)

        resume = options.resume
        if options.resume_if_exists and processes.gather(start.holds_run(options.out))[0]:
            resume = options.out
        if resume is not None:
            run = hold(start.run_to_resume(resume).held())
            state = start.state_to_resume(run, resume)
            config_file = run.config_file
            say(f"going on with {run.path} at step {state['step']}", flush=True)
        else:
            state = None
            defaults = start.choose_defaults(options.loss, Path(__file__).resolve().parent)
            config_file = Path(options.config) if options.config else defaults.config
            why = "as --config says" if options.config else f"because {defaults.reason}"
            say(f"settings: {config_file}, {why}", flush=True)
        settings = read_settings(config_file)
        if resume is None:
            settings, left_out = start.without_another_network(settings, kind)
            if left_out:
                say(f"model: of {config_file}, which is of another kind, without {', '.join(left_out)}", flush=True)
        parsed = parse_arguments(parser, arguments, settings, str(config_file))
        config, why = start.with_precision(to_settings(kind, parser, parsed), processes)
        say(f"arithmetic: {why}", flush=True)
        if resume is not None:
            old = run.read_config()
            from_checkpoint = resume.endswith(".pt")
            start.require_same_run(
                old, config, start.CHANGEABLE_FROM_A_CHECKPOINT if from_checkpoint else start.CHANGEABLE
            )
            start.require_steps_ahead(config.training.steps, state["step"])
            start.require_same_learning_rates(old.training, config.training, state["step"])
        else:
            name = f"{Path(config.data or defaults.data).name}-{config.loss}"
            run = hold(start.new_run(options.out, name))
            config = start.with_data(config, defaults, processes)

        image_set = open_training_set(config.data)
        trainer = Trainer(config, image_set, processes)
        if state is not None:
            start.require_same_data(state, image_set)
            trainer.load_state_dict(state)
            del state  # the copies of the weights would stay for the whole run
        evaluator = Evaluator(config, image_set, processes)
        say(start.summary(trainer, evaluator, image_set, run), flush=True)
        loop = TrainingLoop(trainer, evaluator, run, image_set)
        if processes.is_first:  # now that `latest` stands at the step from which these settings hold
            start.record_provenance(run, config, image_set, processes)
        finished = loop.train()
        say(f"finished: {run.path}" if finished else f"stopped; go on with: python train.py --resume {run.path}")
    return 0 if finished else 130


if __name__ == "__main__":
    with user_errors_exit():
        sys.exit(main(sys.argv[1:]))
