"""Fine-tune Stable Diffusion or SDXL on a few images.

python personalize.py tokens --base BASE [sks http ...]     which rare token can stand for a subject
"""

from __future__ import annotations

import argparse
import warnings

from improved_diffusion.errors import ArgumentParser, UserError, user_errors_exit


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    tokens = commands.add_parser("tokens", help="how candidates for a rare token fare, or suggestions without any")
    tokens.add_argument("candidates", nargs="*", metavar="TOKEN", help="words to look at")
    tokens.add_argument("--base", required=True, help="base model: a folder, or a name on the Hugging Face hub")
    tokens.add_argument("--count", type=int, default=10, help="suggestions (default: %(default)s)")
    return parser.parse_args(arguments)


def tokens(options: argparse.Namespace) -> None:
    from improved_diffusion.personalize.base import load_tokenizer
    from improved_diffusion.personalize.tokens import inspect_token, suggest_tokens, token_table

    tokenizer = load_tokenizer(options.base)
    if options.candidates:
        print(token_table([inspect_token(candidate, tokenizer) for candidate in options.candidates]))
    else:
        print(token_table(suggest_tokens(tokenizer, options.count)))


COMMANDS = {"tokens": tokens}


def main() -> None:
    options = parse_arguments()
    warnings.simplefilter("ignore")  # of the libraries, on their own future
    try:
        COMMANDS[options.command](options)
    except ModuleNotFoundError as error:
        raise UserError(f"{error.name} is missing: pip install 'improved_diffusion[personalize]'") from error


if __name__ == "__main__":
    with user_errors_exit():
        main()
