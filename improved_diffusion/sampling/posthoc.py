"""The average of a run's weights of a length that is chosen after training."""

from __future__ import annotations

from torch import Tensor

from improved_diffusion.checkpoint_file import read_checkpoint
from improved_diffusion.errors import UserError
from improved_diffusion.models.power_ema import Profile, blend
from improved_diffusion.run_directory import RunDirectory


def averaged_weights(run: RunDirectory, step: int, length: float) -> dict[str, Tensor]:
    """The weights at `step`, averaged with a power function of relative `length` (sigma_rel of EDM2), out of the
    averages that the run kept until then.

    Raises:
        UserError: it kept none, one of them is damaged, or no average can be of that length.
    """
    kept = []
    for file in run.averages_until(step):
        averages = read_checkpoint(file, ("step", "power_ema"))
        kept += [(file, Profile(averages["step"], float(name)), name) for name in averages["power_ema"]]
    if not kept:
        raise UserError(
            f"{run.path} kept no averages up to step {step} to make one of another length of: training.ema_lengths "
            "says which, such as [0.05,0.1]"
        )
    try:
        factors = blend([profile for _, profile, _ in kept], Profile(step, length))
    except ValueError as error:
        raise UserError(str(error)) from error
    weights: dict[str, Tensor] = {}
    for factor, (file, _, name) in zip(factors.tolist(), kept, strict=True):  # one file in memory at a time
        for key, average in read_checkpoint(file)["power_ema"][name].items():
            weights[key] = weights.get(key, 0) + factor * average.float()
    return weights
