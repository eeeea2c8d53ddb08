"""The average of a run's weights of a length that is chosen after training."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import NamedTuple

from torch import Tensor

from improved_diffusion.checkpoint_file import read_checkpoint
from improved_diffusion.errors import UserError
from improved_diffusion.models.power_ema import Profile, blend
from improved_diffusion.run_directory import RunDirectory


class KeptAverage(NamedTuple):
    file: Path
    profile: Profile
    name: str  # in the file


def averaged_weights(run: RunDirectory, step: int, length: float) -> dict[str, Tensor]:
    """The weights at `step`, averaged with a power function of relative `length` (sigma_rel of EDM2), out of the
    averages that the run kept until then.

    Raises:
        UserError: it kept none, one of them is damaged, or no average can be of that length.
    """
    kept: list[KeptAverage] = []
    for file in run.averages_until(step):
        averages = read_checkpoint(file, ("step", "power_ema"))
        kept += [KeptAverage(file, Profile(averages["step"], float(name)), name) for name in averages["power_ema"]]
    if not kept:
        raise UserError(
            f"{run.path} kept no averages up to step {step} to make one of another length of: training.ema_lengths "
            "says which, such as [0.05,0.1]"
        )
    try:
        factors = blend([average.profile for average in kept], Profile(step, length))
    except ValueError as error:
        raise UserError(str(error)) from error
    weights: dict[str, Tensor] = {}
    for file, of_file in itertools.groupby(zip(factors.tolist(), kept, strict=True), lambda pair: pair[1].file):
        averages = read_checkpoint(file)["power_ema"]  # one file in memory at a time
        for factor, (_, _, name) in of_file:
            for key, average in averages[name].items():
                weights[key] = weights.get(key, 0) + factor * average.float()
    return weights
