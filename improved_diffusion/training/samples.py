"""What sample.py does: choose a run and classes, and write the images."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from improved_diffusion.config import SamplingConfig
from improved_diffusion.errors import UserError
from improved_diffusion.files import atomic_write
from improved_diffusion.progress import progress
from improved_diffusion.training.devices import Processes
from improved_diffusion.training.generate import LoadedModel, SampleKey, generate, model_denoiser
from improved_diffusion.training.grids import make_grid, save_png

SHIPPED_RUN = Path("pretrained") / "synthetic-64"


def newest_run(project: Path) -> Path:
    """The run under runs/ that saved last, or else the model that ships with the project.

    Raises:
        UserError: there is neither.
    """
    pointers = sorted(Path("runs").glob("**/checkpoints/latest"), key=lambda pointer: pointer.stat().st_mtime)
    if pointers:
        return pointers[-1].parent.parent
    if (project / SHIPPED_RUN).is_dir():
        return project / SHIPPED_RUN
    raise UserError("there is no run under runs/ yet: train one with python train.py, or name one with --run")


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
    out: Path,
    processes: Processes,
    *,
    with_npz: bool,
) -> None:
    """Draw the images of `keys` and write OUT/CLASS/seedSEED_NUMBER.png, OUT.png (all of them; beside the folder, so
    that who measures the folder does not measure it too) and, if asked, OUT/samples.npz.

    Raises:
        UserError: sampling settings that the model cannot follow, or a disk that cannot be written.
    """
    device = processes.device
    denoiser = model_denoiser(model, sampling, device)
    share = keys[processes.rank :: processes.world_size]
    with progress(total=len(share), desc="sampling", unit="image", disable=not processes.is_first) as bar:
        for batch, images in generate(denoiser, share, model.config, sampling, device):
            for key, image in zip(batch, images.cpu().numpy(), strict=True):
                save_png(image, _file(model, key, out))
            bar.update(len(batch))
    processes.wait()
    if not processes.is_first:
        return
    images = np.stack([np.asarray(Image.open(_file(model, key, out))) for key in keys])
    labels = np.array([key.class_index for key in keys])
    classes = sorted(set(labels.tolist()))
    rows = np.stack([images[labels == label] for label in classes])
    save_png(make_grid(rows, tuple(_class_name(model, label) for label in classes)), grid_file(out))
    if with_npz:
        with atomic_write(out / "samples.npz") as temporary, temporary.open("wb") as stream:
            np.savez(stream, arr_0=images, labels=labels)


def grid_file(out: Path) -> Path:
    """Where the picture of all samples goes."""
    return out.with_name(f"{out.name}.png")


def _class_name(model: LoadedModel, label: int) -> str:
    return model.class_names[label] if model.config.model.class_conditional else "images"


def _file(model: LoadedModel, key: SampleKey, out: Path) -> Path:
    """A class name is a folder name, whatever characters it has."""
    folder = _class_name(model, key.class_index).replace("/", "_")
    return out / folder / f"seed{key.seed}_{key.number:06d}.png"
