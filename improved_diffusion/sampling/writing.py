"""Writing the images that sample.py draws."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

import numpy as np

from improved_diffusion.config import SamplingConfig
from improved_diffusion.data.packing import allocate
from improved_diffusion.errors import UserError
from improved_diffusion.files import exclusive
from improved_diffusion.runtime.devices import Processes
from improved_diffusion.sampling.generate import SampleKey, require_drawable
from improved_diffusion.sampling.grids import save_png
from improved_diffusion.sampling.growing_array import open_rows, write_npz
from improved_diffusion.sampling.model import Model
from improved_diffusion.sampling.sample_folder import (
    ARRAY,
    ROWS,
    claim,
    free_folder,
    manifest_of,
    read_manifest,
    read_sample,
    sample_file,
)

SAMPLES = Path("samples")
Result = TypeVar("Result")


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
    """Draw the images of `keys` and write OUT/CLASS/seedSEED_NUMBER.png, OUT/manifest.json and, if asked,
    OUT/samples.npz. Without `out` the folder is samples/NAME_OF_THE_RUN or, where other samples lie there, one whose
    name starts so.

    Images that are there already, whole, are not drawn again: a command that was killed goes on. Only the manifest and
    samples.npz are synced to disk; a crash of the machine may cost images, which are then not whole.

    Returns:
        The folder.

    Raises:
        UserError: sampling settings that the model cannot follow, a folder that holds other samples, or another picture
            where the grid would be, which `overwrite` does not replace; another process that is writing there, or a
            disk that cannot be written.
    """
    # What the model cannot follow is refused before anything is written, or removed.
    model.denoiser(sampling)
    require_drawable(model.config, keys, sampling, model.device)
    if out is not None and out.name in ("", ".."):
        out = out.resolve()  # the grid lies beside the folder, by its name
    with contextlib.ExitStack() as held:
        out = _claim_folder(out, model, sampling, keys, processes, overwrite, held)
        if with_npz:
            _allocate_rows(out / ROWS, model, len(keys), processes)
        _draw_missing(model, keys, sampling, out, processes, with_npz)
        processes.wait()
        if with_npz and processes.is_first:
            write_npz(out / ARRAY, out / ROWS, np.array([key.class_index for key in keys]), model.row_names)
            (out / ROWS).unlink()
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
    held: contextlib.ExitStack,
) -> Path:
    """The folder to write in, which the first process chooses and claims for all, alone until `held` is closed."""

    def claimed() -> Path:
        manifest, name = manifest_of(model, sampling, keys), model.name
        folder = out or (SAMPLES / name if overwrite else free_folder(SAMPLES, name, manifest))
        grid = grid_file(folder)
        if out is not None and not overwrite and grid.exists() and read_manifest(folder) is None:
            raise UserError(f"{grid}, where the grid would go, exists: choose another --out, or give --overwrite")
        lock_file = folder.with_name(f".{folder.name}.lock")
        held.enter_context(exclusive(lock_file, f"another process is writing {folder} at this moment"))
        held.callback(lock_file.unlink, missing_ok=True)
        claim(folder, manifest, overwrite)
        return folder

    return _by_first(claimed, processes)


def _allocate_rows(file: Path, model: Model, count: int, processes: Processes) -> None:
    channels, height, width = model.config.model.image_shape

    def allocated() -> None:
        try:
            allocate(file, (count, height, width, channels))
        except OSError as error:
            raise UserError(f"could not write {file}: {error.strerror or error}") from error

    _by_first(allocated, processes)


def _by_first(function: Callable[[], Result], processes: Processes) -> Result:
    """What `function` returns in the first process, or its error, in all: the others would wait for ever."""
    result, problem = None, None
    if processes.is_first:
        try:
            result = function()
        except UserError as error:
            problem = str(error)
    result, problem = processes.gather((result, problem))[0]
    if problem:
        raise UserError(problem)
    return result


def _draw_missing(
    model: Model,
    keys: Sequence[SampleKey],
    sampling: SamplingConfig,
    out: Path,
    processes: Processes,
    with_npz: bool,
) -> None:
    """This process's share of the images that are not there yet; those that are go into the array alone."""

    def file_of(key: SampleKey) -> Path:
        return out / sample_file(key.seed, model.row_names[key.class_index], key.number)

    def nowhere(row: int, image: np.ndarray) -> None: ...

    with open_rows(out / ROWS) if with_npz else contextlib.nullcontext(nowhere) as write_row:
        missing = []
        for row in range(processes.rank, len(keys), processes.world_size):
            there = read_sample(file_of(keys[row]), model.config.model.image_shape)
            if there is None:
                missing.append(row)
            else:
                write_row(row, there)
        share, rows = [keys[row] for row in missing], iter(missing)
        for batch, images in model.draw(share, sampling, show_progress=processes.is_first):
            for key, image in zip(batch, images, strict=True):
                save_png(image, file_of(key), durable=False)
                write_row(next(rows), image)
