"""What sample.py does: choose a run and classes, and write the images."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from improved_diffusion.config import Config, SamplingConfig
from improved_diffusion.errors import UserError
from improved_diffusion.files import atomic_write
from improved_diffusion.progress import progress
from improved_diffusion.runtime.devices import Processes
from improved_diffusion.sampling.generate import LoadedModel, SampleKey, generate, model_denoiser
from improved_diffusion.sampling.grids import make_grid, save_png
from improved_diffusion.sampling.sample_folder import ARRAY, claim, class_name, free_folder, manifest_of, sample_file
from improved_diffusion.settings import read_settings

SAMPLES = Path("samples")
SHIPPED_RUN = Path("pretrained") / "synthetic-64"


def newest_run(project: Path) -> Path:
    """The run of the pixel job under runs/ that saved last, or else the model that ships with the project.

    Raises:
        UserError: there is neither.
    """
    pointers = sorted(Path("runs").glob("**/checkpoints/latest"), key=lambda pointer: pointer.stat().st_mtime)
    runs = (pointer.parent.parent for pointer in reversed(pointers))
    if newest := next(filter(is_pixel_run, runs), None):
        return newest
    if (project / SHIPPED_RUN).is_dir():
        return project / SHIPPED_RUN
    raise UserError("there is no run under runs/ yet: train one with python train.py, or name one with --run")


def is_pixel_run(path: Path) -> bool:
    """Whether the run at `path` is one of the pixel job: its config has no keys but that job's."""
    try:
        return read_settings(path / "config.yaml").keys() <= {field.name for field in dataclasses.fields(Config)}
    except UserError:
        return False


def choose_classes(name: str, model: LoadedModel) -> list[int]:
    """The indices of the classes that `name` means: one class, or all.

    Raises:
        UserError: no such class; the message lists the nearest names.
    """
    if not model.config.model.class_conditional:
        if name != "all":
            raise UserError("this model was trained without classes: leave out --class")
        return [0]
    if name == "all":
        return list(range(len(model.class_names)))
    if name in model.class_names:
        return [model.class_names.index(name)]
    wanted = name.lower().replace(" ", "_")
    near = difflib.get_close_matches(wanted, model.class_names, n=5, cutoff=0.5) or model.class_names[:5]
    raise UserError(f"the model has no class {name!r} among its {len(model.class_names)}; near it: {', '.join(near)}")


def write_samples(
    model: LoadedModel,
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
    device = processes.device
    denoiser = model_denoiser(model, sampling, device)
    out = _claim_folder(out, model, sampling, keys, processes, overwrite)

    def file_of(key: SampleKey) -> Path:
        return out / sample_file(key.seed, class_name(model, key.class_index), key.number)

    share = keys[processes.rank :: processes.world_size]
    with progress(total=len(share), desc="sampling", unit="image", disable=not processes.is_first) as bar:
        for batch, images in generate(denoiser, share, model.config, sampling, device):
            for key, image in zip(batch, images.cpu().numpy(), strict=True):
                save_png(image, file_of(key))
            bar.update(len(batch))
    processes.wait()
    if not processes.is_first:
        return out
    images = np.stack([np.atleast_3d(Image.open(file_of(key))) for key in keys])
    labels = np.array([key.class_index for key in keys])
    classes = sorted(set(labels.tolist()))
    rows = np.stack([images[labels == label] for label in classes])
    save_png(make_grid(rows, tuple(class_name(model, label) for label in classes)), grid_file(out))
    if with_npz:
        with atomic_write(out / ARRAY) as temporary, temporary.open("wb") as stream:
            np.savez(stream, arr_0=images, labels=labels)
    return out


def grid_file(out: Path) -> Path:
    """Where the picture of all samples goes."""
    return out.with_name(f"{out.name}.png")


def _claim_folder(
    out: Path | None,
    model: LoadedModel,
    sampling: SamplingConfig,
    keys: Sequence[SampleKey],
    processes: Processes,
    overwrite: bool,
) -> Path:
    """The folder to write in, which the first process chooses and claims for all."""
    problem = None
    if processes.is_first:
        manifest, name = manifest_of(model, sampling, keys), model.checkpoint.parent.parent.name
        try:
            out = out or (SAMPLES / name if overwrite else free_folder(SAMPLES, name, manifest))
            claim(out, manifest, overwrite)
        except UserError as error:  # the others would wait for this process for ever
            problem = str(error)
    out, problem = processes.gather((out, problem))[0]
    if problem:
        raise UserError(problem)
    return out
