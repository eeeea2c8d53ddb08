"""personalize.py survey: ask people about generated images, blind, and sum up their answers."""

from __future__ import annotations

import argparse
import contextlib
import json
from dataclasses import asdict
from pathlib import Path

from improved_diffusion.errors import ArgumentParser, UserError
from improved_diffusion.files import write_text


def run(arguments: list[str]) -> None:
    parser = ArgumentParser(prog="personalize.py survey", description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(required=True, metavar="page|serve|report")

    page = commands.add_parser("page", help="make the page, to be served or sent to people as a file")
    page.add_argument("generated", nargs="+", type=Path, help="folders of images with prompts, one for each system")
    page.add_argument("--out", type=Path, required=True, help="HTML file; FILE.key.json beside it is not for them")
    page.add_argument("--references", type=Path, help="images in the trained style; without, style is not asked for")
    page.add_argument("--n", type=int, default=50, help="images in all, evenly of each system (default: %(default)s)")
    page.add_argument("--seed", type=int, default=0, help="of which images are drawn (default: %(default)s)")
    page.add_argument("--title", default="What do you think of these pictures?", help="heading of the page")
    page.set_defaults(command=_page)

    serve = commands.add_parser("serve", help="serve the page and collect the answers")
    serve.add_argument("page", type=Path, help="HTML file, with its key beside it")
    serve.add_argument("--answers", type=Path, required=True, help="folder for a file of each person")
    serve.add_argument("--host", default="127.0.0.1", help="0.0.0.0 for the network (default: %(default)s, only here)")
    serve.add_argument("--port", type=int, default=8000, help="default: %(default)s")
    serve.set_defaults(command=_serve)

    report = commands.add_parser("report", help="sum up the answers")
    report.add_argument("answers", nargs="+", type=Path, help="files, or folders of answers-*.json")
    report.add_argument("--key", type=Path, required=True, help="the key that was written beside the page")
    report.add_argument("--json", type=Path, metavar="FILE", help="the numbers, for programs")
    report.add_argument("--plot", type=Path, metavar="FILE.png", help="the means with their intervals")
    report.set_defaults(command=_report)

    options = parser.parse_args(arguments)
    options.command(options)


def _page(options: argparse.Namespace) -> None:
    if options.seed < 0:
        raise UserError(f"--seed must not be negative, not {options.seed}")
    from improved_diffusion.personalize.data.captioned import open_captioned_set
    from improved_diffusion.personalize.studies.survey.form import key_path
    from improved_diffusion.personalize.studies.survey.page import make_survey, open_systems

    systems = open_systems(options.generated)
    references = open_captioned_set(options.references) if options.references else None
    for images in filter(None, [*systems.values(), references]):
        for line in images.skipped:
            print(f"skipped {line}")
    key = make_survey(systems, options.out, references, options.n, options.seed, options.title)
    print(
        f"{options.out}: {len(key.images)} images, {len(key.images) // len(systems)} of each system, "
        f"{options.out.stat().st_size / 1e6:.1f} MB; asks for {', '.join(key.questions)}"
    )
    print(f"{key_path(options.out)}: which image is whose; keep it from those who answer")
    if not set.intersection(*({image.caption for image in images.images} for images in systems.values())):
        print("note: the systems share no prompt: what a prompt says may tell whose image it is")


def _serve(options: argparse.Namespace) -> None:
    from improved_diffusion.personalize.studies.survey.server import SurveyServer

    with SurveyServer(options.page, options.answers, options.host, options.port) as server:
        print(f"the survey is at http://{options.host}:{server.server_port}/ (Ctrl-C ends it)", flush=True)
        with contextlib.suppress(KeyboardInterrupt):
            server.serve_forever()


def _report(options: argparse.Namespace) -> None:
    from improved_diffusion.personalize.studies.survey.form import read_answers, read_key
    from improved_diffusion.personalize.studies.survey.report import plot, summarise, table

    key = read_key(options.key)
    report = summarise(read_answers(options.answers, key), key)
    print(table(report))
    if options.json:
        write_text(options.json, json.dumps(asdict(report), indent=1) + "\n")
    if options.plot:
        plot(report, options.plot)
