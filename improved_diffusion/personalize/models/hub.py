"""Opening published models: from a folder, from the cache of the Hugging Face hub, or from the hub itself."""

from __future__ import annotations

import contextlib
import io
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi

from improved_diffusion.errors import UserError

# To connect to an address of the hub, and for it to answer. Left alone, transformers tries each file that a model could
# have six times over, for minutes.
TIMEOUT_SECONDS = 3

# diffusers and transformers of a folder without weights, whatever the forms are that they have looked for.
NO_WEIGHTS = re.compile(r"no file named \S*model\.\S+ .*in directory (\S+?)\.?$")


@contextlib.contextmanager
def opening(name: str, what: str, index: str, setting: str, advice: str | None = None) -> Iterator[bool]:
    """Around the `from_pretrained` calls that open a model: one quick question to the hub first, and errors for users.

    Args:
        name: a folder, or a name on the hub.
        what: what messages call it, `base model` say.
        index: the file by which its folder is known.
        setting: the flag with which a user gives the folder.
        advice: what to do where the hub cannot be reached; by default to download the whole model elsewhere.

    Yields:
        What to give those calls as `local_files_only`: False where the hub answers. Where it does not, or `name` is a
        folder, they need no network, and do not wait for one.

    Raises:
        UserError: no such folder, a folder that is none of a model, anything that the calls raise, or a model that is
            neither in the cache nor to be had from the hub; the message then says what to download and how to give it.
    """
    folder = Path(name)
    local = folder.exists() or name.startswith((".", "/", "~")) or name.count("/") != 1
    if local and not (folder / index).is_file():
        problem = f"is no folder of one: it has no {index}" if folder.exists() else "does not exist"
        raise UserError(f"the {what} {name} {problem}; give a folder that save_pretrained wrote, or a name on the hub")
    unreachable = None if local else _why_unreachable(name)
    is_local = local or unreachable is not None
    # A download has a progress bar; those of a second's work on local files are hidden.
    quiet = contextlib.redirect_stderr(io.StringIO()) if is_local else contextlib.nullcontext()
    try:
        with quiet:
            yield is_local
    except UserError:
        raise
    except Exception as error:  # diffusers, transformers and the hub's library raise almost anything
        reason = _one_line(unreachable or error)
        if local:
            raise UserError(f"the {what} {name} cannot be read: {reason}; copy or download it again") from error
        there = f"run `hf download {name} --local-dir DIR`, bring the folder here, and give {setting} DIR"
        raise UserError(
            f"the {what} {name} is neither in the cache nor to be had from the hub ({reason}); "
            + (advice or f"where there is a network {there}")
        ) from error


def require_vocabulary(tokenizer: Any) -> None:
    """Raise ValueError if a tokenizer has none: without its files transformers makes an empty one, and says nothing."""
    if len(tokenizer) <= len(tokenizer.all_special_tokens):
        raise ValueError("the files of its tokenizer are missing")


def _why_unreachable(name: str) -> Exception | None:
    """Why the hub does not tell of the model; None if it does."""
    try:
        HfApi().model_info(name, timeout=TIMEOUT_SECONDS)
    except Exception as error:  # no network, no such model, no permission, no valid name: all are as final here
        return error
    return None


def _one_line(error: Exception) -> str:
    text = " ".join(str(error).split())
    if without := NO_WEIGHTS.search(text):
        others = sorted(file.suffixes[-2] for file in Path(without[1]).glob("*.*.safetensors"))
        hint = f" but those of a variant: give --variant {others[0][1:]}" if others else ""
        return f"there are no weights (.safetensors) in {without[1]}{hint}"
    return text[:160] or type(error).__name__
