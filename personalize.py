"""Fine-tune Stable Diffusion or SDXL on a few images, and measure what came of it.

python personalize.py COMMAND --help     the flags of a command
"""

from __future__ import annotations

import importlib
import sys

from improved_diffusion.commands import split_command
from improved_diffusion.errors import UserError, user_errors_exit
from improved_diffusion.personalize.quiet import quieten_libraries

COMMANDS = {  # each is a module of improved_diffusion.personalize.commands
    "train": "fine-tune a base on images: LoRA, DreamBooth, textual inversion",
    "generate": "pictures from texts, or from texts and a picture",
    "sweep": "a grid over tokens, scales, guidance, seeds and prompts, scored",
    "evaluate": "CLIP-T, CLIP-I, DINO, KID, FID, Inception Score and LPIPS of a folder of pictures",
    "compare": "what pictures of the same seeds have lost, quantized ones for one",
    "export": "an adapter for diffusers, ComfyUI and others, verified",
    "survey": "a blind survey among people about generated images: its page, a server, a report",
    "caption": "captions for a folder of images, by BLIP",
    "tokens": "which rare token can stand for a subject",
}
EXTRAS = {"wandb": "wandb", "bitsandbytes": "few-bits", "torchao": "few-bits"}  # of setup.py


def main(arguments: list[str]) -> None:
    command, rest = split_command(__doc__.splitlines()[0], COMMANDS, arguments)
    quieten_libraries()
    try:
        importlib.import_module(f"improved_diffusion.personalize.commands.{command}").run(rest)
    except RuntimeError as error:
        if type(error).__name__ != "OutOfMemoryError":  # torch's, which is not imported here
            raise
        advice = "smaller batches, a smaller resolution, or for train training.gradient_checkpointing true"
        raise UserError(f"the GPU has no memory left: try {advice}") from error
    except ModuleNotFoundError as error:
        extra = EXTRAS.get(error.name, "personalize")
        raise UserError(f"{error.name} is missing: in the checkout, pip install -e '.[{extra}]'") from error


if __name__ == "__main__":
    with user_errors_exit():
        main(sys.argv[1:])
