"""Silence for the libraries, whose remarks on their own inner workings would hide ours. To be called before they are
imported."""

from __future__ import annotations

import logging
import os
import warnings

VARIABLES = {
    "TOKENIZERS_PARALLELISM": "false",
    "DIFFUSERS_VERBOSITY": "critical",
    "TRANSFORMERS_VERBOSITY": "error",
}


def quieten_libraries() -> None:
    """For the rest of this process, unless the environment says otherwise."""
    warnings.simplefilter("ignore")  # on their own future
    for variable, value in VARIABLES.items():
        os.environ.setdefault(variable, value)
    logging.getLogger("torch.utils._pytree").setLevel(logging.ERROR)  # which torchao makes warn of itself
