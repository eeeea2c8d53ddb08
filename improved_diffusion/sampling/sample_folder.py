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

import numpy as np
from PIL import Image

from improved_diffusion.config import SamplingConfig
from improved_diffusion.data.decode import EXTENSIONS
from improved_diffusion.errors import UserError
from improved_diffusion.files import write_text
from improved_diffusion.provenance import project_version
from improved_diffusion.sampling.generate import SampleKey
from improved_diffusion.sampling.model import Model
from improved_diffusion.sampling.run_source import generating_code_hash
from improved_diffusion.sampling.series import shown

MANIFEST, ARRAY = "manifest.json", "samples.npz"
ROWS = ".arr_0.npy.tmp"  # the images of ARRAY while they are drawn
SAMPLE_NAME = re.compile(r"seed\d+_\d{6,}\.png")
# Of a manifest: what may differ without its images being others. With other code they may be: they are drawn anew.
INFORMATION = {"checkpoint", "selected_on", "improved_diffusion", "generating_code"}

Manifest = dict[str, Any]


def manifest_of(model: Model, sampling: SamplingConfig, keys: Sequence[SampleKey]) -> Manifest:
    """What is to be drawn, and from what."""
    return {
        "checkpoint": str(model.checkpoint),
        **model.image_record(sampling),
        "selected_on": model.selected_on,
        "improved_diffusion": project_version(),
        "generating_code": generating_code_hash(),
        "keys": [[key.seed, model.row_names[key.class_index], key.number] for key in keys],
    }


def sample_file(seed: int, class_name: str, number: int) -> str:
    """Where the image of a key lies in the folder. A class name is a folder name, whatever characters it has."""
    return f"{class_name.replace('/', '_')}/seed{seed}_{number:06d}.png"


def read_sample(file: Path, image_shape: tuple[int, int, int]) -> np.ndarray | None:
    """uint8 (H, W, C): the image in `file`, for `image_shape` (C, H, W); None where there is none, or no whole one."""
    channels, height, width = image_shape
    try:
        with Image.open(file) as image:
            pixels = np.atleast_3d(np.asarray(image))
    except Exception:  # Pillow has no common base class for what a damaged file can raise
        return None
    return pixels if pixels.shape == (height, width, channels) else None


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

    Those of the same manifest stay, unless other code drew them; what killed commands left half-written goes.

    Raises:
        UserError: it holds other samples, or images that are no samples, which are never removed.
    """
    if image := stranger(folder):
        raise UserError(f"{image} is no sample of sample.py's and would be taken for one: choose another --out")
    problem = conflict(folder, manifest)
    if problem and not overwrite:
        raise UserError(f"{folder} holds {problem}: choose another --out, or give --overwrite")
    there = read_manifest(folder) or {}
    if problem or there.get("generating_code") != manifest["generating_code"]:
        for path in _samples(folder):
            path.unlink(missing_ok=True)
        (folder / MANIFEST).unlink(missing_ok=True)
    for pattern in (ROWS, f".{ARRAY}.*.tmp", f".{MANIFEST}.*.tmp", "*/.seed*.png.*.tmp"):
        for path in folder.glob(pattern):
            path.unlink(missing_ok=True)
    write_text(folder / MANIFEST, json.dumps(manifest) + "\n")


def free_folder(parent: Path, name: str, manifest: Manifest) -> Path:
    """`parent`/`name`, or the first of NAME-2, NAME-3, ... that holds nothing but, perhaps, samples of `manifest`."""
    candidates = (parent / (name if i == 1 else f"{name}-{i}") for i in itertools.count(1))
    return next(folder for folder in candidates if not stranger(folder) and not conflict(folder, manifest))


def stranger(folder: Path) -> Path | None:
    """An image below `folder` that is no sample; None if there is none."""
    images = (path for path in folder.rglob("*") if path.suffix.lower() in EXTENSIONS)
    return next((path for path in images if not _is_sample(folder, path)), None)


def conflict(folder: Path, manifest: Manifest) -> str | None:
    """What samples `folder` holds that are not those of `manifest`; None if it holds no others."""
    there = read_manifest(folder)
    if there is None:
        return "samples without a manifest" if any(_samples(folder)) else None
    different = []
    for name in ({*there} | {*manifest}) - INFORMATION - {"keys"}:
        old, new = there.get(name), manifest.get(name)
        if old != new:
            different.append(f"{name} {shown(old)}, not {shown(new)}")
    if there["keys"] != manifest["keys"]:
        different.append("other seeds, classes or numbers")
    return f"other samples ({'; '.join(sorted(different))})" if different else None


def _samples(folder: Path) -> Iterator[Path]:
    """What sample.py has written."""
    files = itertools.chain(folder.glob("*/seed*.png"), folder.glob(ARRAY))
    return (file for file in files if file.name == ARRAY or _is_sample(folder, file))


def _is_sample(folder: Path, image: Path) -> bool:
    return image.parent.parent == folder and SAMPLE_NAME.fullmatch(image.name) is not None
