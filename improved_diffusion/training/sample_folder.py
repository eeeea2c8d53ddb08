"""The folder that sample.py fills: images of one model and one set of settings, and a manifest that says which.

OUT/manifest.json  OUT/CLASS/seedSEED_NUMBER.png ...  OUT/samples.npz
"""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from improved_diffusion.config import SamplingConfig
from improved_diffusion.data.decode import EXTENSIONS
from improved_diffusion.errors import UserError
from improved_diffusion.files import atomic_write
from improved_diffusion.provenance import project_version
from improved_diffusion.run_directory import RunDirectory
from improved_diffusion.training.generate import LoadedModel, SampleKey, image_record
from improved_diffusion.training.series import selection, shown

MANIFEST, ARRAY = "manifest.json", "samples.npz"
SAMPLE_NAME = re.compile(r"seed\d+_\d{6,}\.png")
INFORMATION = {"checkpoint", "selected_on", "improved_diffusion"}  # of a manifest: what may differ between equal images

Manifest = dict[str, Any]


def manifest_of(
    model: LoadedModel, sampling: SamplingConfig, keys: Sequence[SampleKey], device: torch.device
) -> Manifest:
    """What is to be drawn, and from what."""
    return {
        "checkpoint": str(model.checkpoint),
        **image_record(model, sampling, device),
        "selected_on": selection(RunDirectory(model.checkpoint.parent.parent), model.step),
        "improved_diffusion": project_version(),
        "keys": [[key.seed, class_name(model, key.class_index), key.number] for key in keys],
    }


def class_name(model: LoadedModel, label: int) -> str:
    """The name of a class; `images` for a model without classes."""
    return model.class_names[label] if model.config.model.class_conditional else "images"


def sample_file(seed: int, class_name: str, number: int) -> str:
    """Where the image of a key lies in the folder. A class name is a folder name, whatever characters it has."""
    return f"{class_name.replace('/', '_')}/seed{seed}_{number:06d}.png"


def read_manifest(folder: Path) -> Manifest | None:
    """The manifest in `folder`; None if there is none, or a file of that name which something else wrote."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text())
        names = [sample_file(*key) for key in manifest["keys"]]
        return manifest if names and "checkpoint_sha256" in manifest else None
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        return None


def claim(folder: Path, manifest: Manifest, overwrite: bool) -> None:
    """Make `folder` one for the images of `manifest`, and write that there; with `overwrite` other samples go.

    Raises:
        UserError: it holds other samples, or images that are no samples.
    """
    problem = conflict(folder, manifest)
    if problem and overwrite:
        _remove_samples(folder)
        problem = conflict(folder, manifest)
    elif problem:
        problem += ", or give --overwrite"
    if problem:
        raise UserError(problem)
    with atomic_write(folder / MANIFEST) as temporary:
        temporary.write_text(json.dumps(manifest) + "\n")


def free_folder(parent: Path, name: str, manifest: Manifest) -> Path:
    """`parent`/`name`, or the first of NAME-2, NAME-3, ... that holds no samples other than those of `manifest`."""
    candidates = (parent / (name if i == 1 else f"{name}-{i}") for i in itertools.count(1))
    return next(folder for folder in candidates if conflict(folder, manifest) is None)


def conflict(folder: Path, manifest: Manifest) -> str | None:
    """Why the images of `manifest` cannot lie in `folder`, with the way out; None if they can."""
    there = read_manifest(folder)
    if there is None:
        image = next(_images(folder), None)
        return image and f"{folder} holds images that no {MANIFEST} describes ({image.name}): choose another --out"
    decisive = [name for name in {**there, **manifest} if name not in INFORMATION]
    different = [name for name in decisive if there.get(name) != manifest.get(name)]
    if not different:
        return None
    settings = [_difference(name, there.get(name), manifest.get(name)) for name in different]
    return f"{folder} holds other samples ({'; '.join(settings)}): choose another --out"


def _difference(name: str, old: Any, new: Any) -> str:
    return "other seeds, classes or numbers" if name == "keys" else f"{name} {shown(old)}, not {shown(new)}"


def _images(folder: Path) -> Iterator[Path]:
    """What a measurement would take for images."""
    return (path for path in folder.rglob("*") if path.suffix.lower() in EXTENSIONS or path.name == ARRAY)


def _remove_samples(folder: Path) -> None:
    """Remove what sample.py writes, and nothing else."""
    samples = [path for path in _images(folder) if path.name == ARRAY or SAMPLE_NAME.fullmatch(path.name)]
    for path in [*samples, folder / MANIFEST]:
        path.unlink(missing_ok=True)
    for class_folder in {path.parent for path in samples} - {folder}:
        if not any(class_folder.iterdir()):
            class_folder.rmdir()
