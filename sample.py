"""Draw images from a trained model.

python sample.py --class creme_brulee              16 images from the newest run
python sample.py --class waffles donuts --n 4      of several classes
python sample.py --class all --n 4 --run runs/hybrid --sampler ddim --sampling-steps 50 --guidance-scale 1.5
torchrun --nproc-per-node 8 -- sample.py ...       the same images, from several GPUs
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from improved_diffusion.errors import ArgumentParser, user_errors_exit
from improved_diffusion.sampling.flags import EMA_LENGTH_HELP, add_sampling_flags, flag_changes, split_guide


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = ArgumentParser(prog="sample.py", description=__doc__.splitlines()[0])
    parser.add_argument("--class", dest="classes", nargs="+", default=["all"], metavar="NAME", help="default: all")
    parser.add_argument(
        "--run", help="run directory, checkpoint, .safetensors file, or pretrained (default: the newest run, or that)"
    )
    parser.add_argument("--checkpoint", help="best, latest or step_0015000.pt (default: best, or else latest)")
    parser.add_argument("--ema", type=float, metavar="RATE", help="moving average of the weights (default: the first)")
    parser.add_argument("--ema-length", type=float, metavar="SIGMA_REL", help=EMA_LENGTH_HELP)
    parser.add_argument("--n", type=int, default=16, help="images per class (default: 16)")
    parser.add_argument("--batch-size", type=int, help="images drawn at once; changes speed and memory only")
    parser.add_argument("--seed", type=int, default=0, help="default: 0")
    parser.add_argument("--npz", action="store_true", help="also write samples.npz: arr_0 (N, H, W, 3), labels (N,)")
    parser.add_argument("--strip", action="store_true", help="also draw how the first image of each class comes about")
    parser.add_argument(
        "--beside", type=Path, metavar="SET", help="packed set: its images of each class to the right of the grid"
    )
    parser.add_argument("--out", type=Path, help="folder (default: samples/NAME_OF_THE_RUN, or a free name like it)")
    parser.add_argument("--overwrite", action="store_true", help="replace other samples that are in the folder")
    add_sampling_flags(parser)
    return parser.parse_args(arguments)


def main(arguments: list[str]) -> int:
    options = parse(arguments)

    # Only now, for torch takes seconds to import: --help and typos are answered at once.
    from improved_diffusion import load
    from improved_diffusion.runtime.devices import start_processes
    from improved_diffusion.sampling.grids import save_png
    from improved_diffusion.sampling.loading import newest_run
    from improved_diffusion.sampling.model import change_sampling
    from improved_diffusion.sampling.overview import Overview
    from improved_diffusion.sampling.strip import draw_strip
    from improved_diffusion.sampling.writing import grid_file, write_samples

    with start_processes() as processes:
        model = load(
            *(options.run or newest_run(), options.checkpoint, options.ema, processes.device),
            ema_length=options.ema_length,
        )
        if options.guide:
            model = model.guided_by(load(*split_guide(options.guide), device=processes.device))
        sampling = change_sampling(model.config.sampling, **flag_changes(options), batch_size=options.batch_size)
        classes = None if options.classes == ["all"] else list(dict.fromkeys(options.classes))
        keys = model.keys(classes, options.n, options.seed)
        overview = Overview(model, keys, options.beside)
        if processes.is_first:
            trained = f"{model.checkpoint} (step {model.step:,})"
            print(f"model: {trained}; {len(keys)} images, drawn in {model.precision}", flush=True)
        out = write_samples(
            *(model, keys, sampling, options.out, processes), with_npz=options.npz, overwrite=options.overwrite
        )
        if processes.is_first:
            written = [f"{out}/CLASS/seed{options.seed}_NUMBER.png", *([f"{out}/samples.npz"] if options.npz else [])]
            if options.strip:
                written.append(str(grid_file(out, "_strip")))
                save_png(draw_strip(model, keys, sampling), grid_file(out, "_strip"))
            save_png(overview.draw(out), grid_file(out))
            print(f"wrote {grid_file(out)} ({overview.caption}), {', '.join(written)}")
    return 0


if __name__ == "__main__":
    with user_errors_exit():
        sys.exit(main(sys.argv[1:]))
