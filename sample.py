"""Draw images from a trained model.

python sample.py --class creme_brulee              16 images from the newest run
python sample.py --class all --n 4 --run runs/hybrid --sampler ddim --sampling-steps 50 --guidance-scale 1.5
torchrun --nproc-per-node 8 -- sample.py ...       the same images, from several GPUs
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from pathlib import Path

from improved_diffusion.errors import ArgumentParser, UserError, user_errors_exit


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = ArgumentParser(prog="sample.py", description=__doc__.splitlines()[0])
    parser.add_argument("--class", dest="class_name", default="all", help="a class name, or all (default: all)")
    parser.add_argument("--run", help="run directory (default: the newest run, or else the model that ships)")
    parser.add_argument("--checkpoint", help="best, latest or step_0015000.pt (default: best, or else latest)")
    parser.add_argument("--ema", type=float, metavar="RATE", help="moving average of the weights (default: the first)")
    parser.add_argument("--n", type=int, default=16, help="images per class (default: 16)")
    parser.add_argument("--sampler", choices=("ancestral", "ddim"), help="default: the run's own")
    parser.add_argument("--sampling-steps", type=int, help="default: the run's own")
    parser.add_argument("--guidance-scale", type=float, help="default: the run's own")
    parser.add_argument("--batch-size", type=int, help="images drawn at once; changes speed and memory only")
    parser.add_argument("--seed", type=int, default=0, help="default: 0")
    parser.add_argument("--npz", action="store_true", help="also write samples.npz: arr_0 (N, H, W, 3), labels (N,)")
    parser.add_argument("--out", type=Path, help="folder (default: samples/NAME_OF_THE_RUN, or a free name like it)")
    parser.add_argument("--overwrite", action="store_true", help="replace other samples that are in the folder")
    return parser.parse_args(arguments)


def main(arguments: list[str]) -> int:
    options = parse(arguments)

    # Only now, for torch takes seconds to import: --help and typos are answered at once.
    from improved_diffusion.training import generate, samples
    from improved_diffusion.training.devices import start_processes

    overrides = {
        "sampler": options.sampler,
        "steps": options.sampling_steps,
        "guidance_scale": options.guidance_scale,
        "batch_size": options.batch_size,
    }
    with start_processes() as processes:
        run = Path(options.run) if options.run else samples.newest_run(Path(__file__).resolve().parent)
        model = generate.load_model(run, processes.device, options.checkpoint, options.ema)
        given = {name: value for name, value in overrides.items() if value is not None}
        sampling = dataclasses.replace(model.config.sampling, **given)
        classes = samples.choose_classes(options.class_name, model)
        if options.n < 1 or options.seed < 0:
            raise UserError(f"--n must be at least 1 and --seed at least 0, not {options.n} and {options.seed}")
        keys = [generate.SampleKey(options.seed, label, number) for label in classes for number in range(options.n)]
        if processes.is_first:
            trained = f"{model.checkpoint} (step {model.step:,})"
            print(f"model: {trained}; {len(keys)} images, drawn in {model.precision}", flush=True)
        out = samples.write_samples(
            *(model, keys, sampling, options.out, processes), with_npz=options.npz, overwrite=options.overwrite
        )
        if processes.is_first:
            npz = f" and {out}/samples.npz" if options.npz else ""
            print(f"wrote {samples.grid_file(out)}, {out}/CLASS/seed{options.seed}_NUMBER.png{npz}")
    return 0


if __name__ == "__main__":
    with user_errors_exit():
        sys.exit(main(sys.argv[1:]))
