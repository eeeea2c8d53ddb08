"""Writing the images that sample.py draws."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from improved_diffusion.config import SamplingConfig
from improved_diffusion.errors import UserError
from improved_diffusion.files import atomic_write
from improved_diffusion.runtime.devices import Processes
from improved_diffusion.sampling.generate import SampleKey
from improved_diffusion.sampling.grids import make_grid, save_png
from improved_diffusion.sampling.model import Model
from improved_diffusion.sampling.sample_folder import ARRAY, claim, free_folder, manifest_of, sample_file

SAMPLES = Path("samples")


def write_samples(
    model: Model,
    keys: Sequence[SampleKey],
    sampling: SamplingConfig,
    out: Path | None,
    processes: Processes,
    *,
    with_npz: bool,
    overwrite: bool,
) -> Path:
    """Draw the images of `keys` and write OUT/CLASS/seedSEED_NUMBER.png, OUT.png (all of them; beside the folder, so
    that who measures the folder does not measure it too), OUT/manifest.json and, if asked, OUT/samples.npz. Without
    `out` the folder is samples/NAME_OF_THE_RUN or, where other samples lie there, one whose name starts so.

    Returns:
        The folder.

    Raises:
        UserError: sampling settings that the model cannot follow, a folder that holds other samples which `overwrite`
            does not replace, or a disk that cannot be written.
    """
    model.denoiser(sampling)  # refuses what the model cannot follow before anything is written
    out = _claim_folder(out, model, sampling, keys, processes, overwrite)

    def file_of(key: SampleKey) -> Path:
        return out / sample_file(key.seed, model.row_names[key.class_index], key.number)

    share = keys[processes.rank :: processes.world_size]
    for batch, images in model.draw(share, sampling, show_progress=processes.is_first):
        for key, image in zip(batch, images, strict=True):
            save_png(image, file_of(key))
    processes.wait()
    if not processes.is_first:
        return out
    images = np.stack([np.atleast_3d(np.asarray(Image.open(file_of(key)))) for key in keys])
    labels = np.array([key.class_index for key in keys])
    classes = sorted(set(labels.tolist()))
    rows = np.stack([images[labels == label] for label in classes])
    save_png(make_grid(rows, tuple(model.row_names[label] for label in classes)), grid_file(out))
    if with_npz:
        with atomic_write(out / ARRAY) as temporary, temporary.open("wb") as stream:
            np.savez(stream, arr_0=images, labels=labels)
    return out


def grid_file(out: Path, suffix: str = "") -> Path:
    """Where a picture of all samples goes: beside their folder."""
    return out.with_name(f"{out.name}{suffix}.png")


def _claim_folder(
    out: Path | None,
    model: Model,
    sampling: SamplingConfig,
    keys: Sequence[SampleKey],
    processes: Processes,
    overwrite: bool,
) -> Path:
    """The folder to write in, which the first process chooses and claims for all."""
    problem = None
    if processes.is_first:
        manifest, name = manifest_of(model, sampling, keys), model.name
        try:
            out = out or (SAMPLES / name if overwrite else free_folder(SAMPLES, name, manifest))
            claim(out, manifest, overwrite)
        except UserError as error:  # the others would wait for this process for ever
            problem = str(error)
    out, problem = processes.gather((out, problem))[0]
    if problem:
        raise UserError(problem)
    return out
