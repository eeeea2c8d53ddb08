"""The folder that sample.py fills: images of one model and one set of settings, and a manifest that says which.

OUT/manifest.json  OUT/CLASS/seedSEED_NUMBER.png ...  OUT/samples.npz
"""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from improved_diffusion.config import SamplingConfig
from improved_diffusion.data.decode import EXTENSIONS
from improved_diffusion.errors import UserError
from improved_diffusion.files import atomic_write
from improved_diffusion.provenance import project_version
from improved_diffusion.sampling.generate import SampleKey
from improved_diffusion.sampling.model import Model
from improved_diffusion.sampling.series import shown

MANIFEST, ARRAY = "manifest.json", "samples.npz"
SAMPLE_NAME = re.compile(r"seed\d+_\d{6,}\.png")
INFORMATION = {"checkpoint", "selected_on", "improved_diffusion"}  # of a manifest: what may differ between equal images

Manifest = dict[str, Any]


def manifest_of(model: Model, sampling: SamplingConfig, keys: Sequence[SampleKey]) -> Manifest:
    """What is to be drawn, and from what."""
    return {
        "checkpoint": str(model.checkpoint),
        **model.image_record(sampling),
        "selected_on": model.selected_on,
        "improved_diffusion": project_version(),
        "keys": [[key.seed, model.row_names[key.class_index], key.number] for key in keys],
    }


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
        UserError: it holds other samples, or images that are no samples, which are never removed.
    """
    if image := stranger(folder):
        raise UserError(f"{image} is no sample of sample.py's and would be taken for one: choose another --out")
    if problem := conflict(folder, manifest):
        if not overwrite:
            raise UserError(f"{folder} holds {problem}: choose another --out, or give --overwrite")
        for path in [*_samples(folder), folder / MANIFEST]:
            path.unlink(missing_ok=True)
    with atomic_write(folder / MANIFEST) as temporary:
        temporary.write_text(json.dumps(manifest) + "\n")


def free_folder(parent: Path, name: str, manifest: Manifest) -> Path:
    """`parent`/`name`, or the first of NAME-2, NAME-3, ... that holds nothing but, perhaps, samples of `manifest`."""
    candidates = (parent / (name if i == 1 else f"{name}-{i}") for i in itertools.count(1))
    return next(folder for folder in candidates if not stranger(folder) and not conflict(folder, manifest))


def stranger(folder: Path) -> Path | None:
    """An image below `folder` that is no sample; None if there is none."""
    samples = set(_samples(folder))
    images = (path for path in folder.rglob("*") if path.suffix.lower() in EXTENSIONS)
    return next((path for path in images if path not in samples), None)


def conflict(folder: Path, manifest: Manifest) -> str | None:
    """What samples `folder` holds that are not those of `manifest`; None if it holds no others."""
    there = read_manifest(folder)
    if there is None:
        return "samples without a manifest" if _samples(folder) else None
    different = []
    for name in ({*there} | {*manifest}) - INFORMATION - {"keys"}:
        old, new = there.get(name), manifest.get(name)
        if old != new:
            different.append(f"{name} {shown(old)}, not {shown(new)}")
    if there["keys"] != manifest["keys"]:
        different.append("other seeds, classes or numbers")
    return f"other samples ({'; '.join(sorted(different))})" if different else None


def _samples(folder: Path) -> list[Path]:
    """What sample.py has written."""
    files = [*folder.glob("*/seed*.png"), *folder.glob(ARRAY)]
    return [file for file in files if file.name == ARRAY or SAMPLE_NAME.fullmatch(file.name)]
