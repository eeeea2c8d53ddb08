"""Opening a tuned model: from a run, or from an adapter's file of this or another program."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from improved_diffusion.errors import UserError
from improved_diffusion.personalize.config import PersonalizeConfig
from improved_diffusion.personalize.models.adapters import ADAPTER, adapted_parts
from improved_diffusion.personalize.models.base import Base, load_base
from improved_diffusion.personalize.models.trained import prepare
from improved_diffusion.run_directory import RunDirectory, read_checkpoint


@dataclass(frozen=True, eq=False)
class Tuned:
    """A tuned base, and where it came from."""

    base: Base
    config: PersonalizeConfig
    step: int
    checkpoint: Path


def load_run(
    run: RunDirectory,
    checkpoint: str | None = None,
    base: str | None = None,
    device: torch.device | str = "cpu",
    dtype: str = "float32",
) -> Tuned:
    """The model of a run: the moving average of what it trained, where it keeps one.

    Args:
        run: a run of personalize.py.
        checkpoint: best, latest or a file's name; by default the best, or else the latest.
        base: where the base is now; by default where the run had it.
        device, dtype: where the model is wanted, and in what.

    Raises:
        UserError: no such run, checkpoint or base, or a base of another architecture.
    """
    config = run.read_config(PersonalizeConfig)
    file = run.choose_checkpoint(checkpoint)
    state = read_checkpoint(file, ("step", "model", "ema"))
    opened = load_base(base or config.base).to(device, dtype, config.training.vae_precision)
    trained = prepare(opened, config)
    trained.load_state_dict(next(iter(state["ema"].values())) if state["ema"] else state["model"])
    if config.method == "full":
        opened.to(device, dtype, config.training.vae_precision)  # float32 was for training
    return Tuned(opened, config, state["step"], file)


def load_adapter(base: Base, file: Path) -> None:
    """Give `base` the adapters in a .safetensors file, of diffusers' or kohya's form, in place.

    Raises:
        UserError: no such file, a damaged one, or adapters of another architecture.
    """
    if not file.is_file():
        raise UserError(f"there is no adapter at {file}")
    try:
        state = load_file(file)
        if len(_alphas(state)) > 1:
            base.pipeline.load_lora_weights(_with_one_alpha(state), adapter_name=ADAPTER)
        else:  # the file, for in diffusers' form the alpha is in its header
            base.pipeline.load_lora_weights(file.parent, weight_name=file.name, adapter_name=ADAPTER)
    except Exception as error:  # diffusers and PEFT raise almost anything
        reason = " ".join(str(error).split())[:100] or type(error).__name__
        kind = "SDXL" if base.is_sdxl else "Stable Diffusion 1 or 2"
        raise UserError(
            f"the adapter {file} is damaged, or of another architecture than {base.name}, which is {kind} ({reason}...)"
        ) from error
    if not adapted_parts(base):
        raise UserError(f"the adapter {file} fits no layer of {base.name}: it is of another architecture")


def _alphas(state: dict[str, Tensor]) -> Counter[float]:
    """How many layers of a file in kohya's form have each alpha; in diffusers' form there are none."""
    return Counter(tensor.item() for name, tensor in state.items() if name.endswith(".alpha"))


def _with_one_alpha(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same adapter with the commonest alpha for all layers, for diffusers takes that for all of them, whatever
    theirs are: the others' weights are scaled instead."""
    common = _alphas(state).most_common(1)[0][0]
    changed = dict(state)
    for name, tensor in state.items():
        if name.endswith(".alpha"):
            up = f"{name.removesuffix('.alpha')}.lora_up.weight"
            changed[up] = state[up] * (tensor.item() / common)
            changed[name] = torch.tensor(common)
    return changed
