"""personalize.py tokens: which rare token can stand for a subject."""

from __future__ import annotations

from improved_diffusion.errors import ArgumentParser


def run(arguments: list[str]) -> None:
    parser = ArgumentParser(prog="personalize.py tokens", description=__doc__.splitlines()[0])
    parser.add_argument("candidates", nargs="*", metavar="TOKEN", help="words to look at (default: suggestions)")
    parser.add_argument("--base", required=True, help="base model: a folder, or a name on the Hugging Face hub")
    parser.add_argument("--count", type=int, default=10, help="suggestions (default: %(default)s)")
    options = parser.parse_args(arguments)
    if options.count < 1:
        parser.error(f"--count must be at least 1, not {options.count}")

    # Imported only now: transformers takes seconds, and --help should not.
    from improved_diffusion.personalize.models.base import load_tokenizer
    from improved_diffusion.personalize.models.tokens import inspect_token, suggest_tokens, token_table

    tokenizer = load_tokenizer(options.base)
    if options.candidates:
        print(token_table([inspect_token(candidate, tokenizer) for candidate in options.candidates]))
    else:
        print(token_table(suggest_tokens(tokenizer, options.count)))
