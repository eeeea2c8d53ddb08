"""Draw a grid of settings from runs, which are trained first if need be, and score it.

python personalize.py sweep --config configs/rare_tokens.yaml --out runs/tokens -- --base BASE --data DIR
python personalize.py sweep --runs '[runs/dog]' --draw.unet_scales '[0.4,0.7,1]' --out grid

What stands after -- are flags of personalize.py train, for the runs that are trained.
"""

from __future__ import annotations

from pathlib import Path

from improved_diffusion.settings import parse_arguments, read_settings, require, settings_parser, to_settings


def run(arguments: list[str]) -> None:
    from improved_diffusion.personalize.studies.sweep_config import SweepConfig

    own, flags = arguments, []
    if "--" in arguments:
        own, flags = arguments[: arguments.index("--")], arguments[arguments.index("--") + 1 :]
    parser = settings_parser(SweepConfig, prog="personalize.py sweep", description=__doc__.splitlines()[0])
    parser.add_argument("--config", help="YAML file of settings")
    parser.add_argument("--out", help="folder of the results; an interrupted sweep goes on in it")
    parser.add_argument("--device", help="cpu, cuda, cuda:1 ... (default: cuda if there is one)")
    options = parse_arguments(parser, own)
    require(options.out is not None, "where to? give --out, a folder")
    out = Path(options.out)
    require(not out.is_file(), f"{out} is a file, and the results are a folder: choose another --out")
    settings = read_settings(options.config) if options.config else {}
    config = to_settings(SweepConfig, parser, parse_arguments(parser, own, settings, options.config or ""))

    # Imported only now: torch takes seconds, and typos are answered at once.
    from improved_diffusion.personalize.studies import sweep, sweep_report
    from improved_diffusion.runtime.devices import drawing_precision, usable_device

    device = usable_device(options.device)
    runs = [Path(run) for run in config.runs]
    if not runs:
        runs = sweep.train_runs(config, out / "runs", Path(options.config or "."), flags)
    drawn = sweep.draw_grid(config, runs, out, str(device), drawing_precision(device))
    summary = sweep_report.summarise(drawn)
    sweep_report.write_results(drawn, summary, out)
    print(sweep_report.table(summary))
    print(f"all pictures: {out / 'sheet.png'}; scores: {out / 'scores.csv'}, {out / 'summary.csv'}")
