"""What a measurement says of the images on each of its sides."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

from improved_diffusion.files import file_sha256
from improved_diffusion.metrics.images.files import FileSource
from improved_diffusion.metrics.images.sources import Source
from improved_diffusion.metrics.statistics import FeatureStatistics
from improved_diffusion.sampling.run_source import RunSource
from improved_diffusion.sampling.sample_folder import ARRAY, read_manifest, sample_file

Identity = dict[str, Any]


def identify(side: Source | FeatureStatistics) -> Identity:
    """`path`, `content_hash` and `n` (images) of one side; of generated images also the checkpoint and the settings.

    A `selected_on` says how that checkpoint was chosen, where it was (see `series.selection`). The hash of saved
    statistics is that of their file.
    """
    if isinstance(side, FeatureStatistics):
        return {"path": side.name, "content_hash": file_sha256(Path(side.name)), "n": side.n}
    common = {"path": side.name, "content_hash": side.content_hash, "n": len(side)}
    if not isinstance(side, RunSource):
        return {**common, **_manifest(side)}
    model = side.model
    return {
        **common,
        "path": str(model.source),
        "checkpoint": str(model.checkpoint),
        **model.image_record(side.sampling),
        "generation_seed": side.keys[0].seed,
        "selected_on": model.selected_on,
    }


def _manifest(source: Source) -> Identity:
    """What sample.py wrote beside the images, if it did: without the keys of all images, but with their seed."""
    path = Path(source.name)
    manifest = read_manifest(path.parent if path.name == ARRAY else path)
    if manifest is None:
        return {}
    keys = manifest.pop("keys")
    there = {sample_file(*key) for key in keys}
    found = set(source.image_names) if isinstance(source, FileSource) else there
    if found != there:
        missing, others = len(there - found), len(found - there)
        warnings.warn(
            f"{path} is not what its manifest says: {missing} of {len(there)} images are missing, and {others} others "
            "are there; draw the samples again",
            stacklevel=2,
        )
    (seed, *other_seeds) = {seed for seed, _, _ in keys}
    return {**manifest, "generation_seed": None if other_seeds else seed}


def warn_of_selection(real: Identity, fake: Identity) -> None:
    """Warn where the checkpoint that drew `fake` was chosen by its distance from `real`."""
    chosen = fake.get("selected_on")
    if not chosen or chosen["content_hash"] != real["content_hash"]:
        return
    message = (
        f"{fake['checkpoint']} was chosen on {real['path']}, as the best of {chosen['candidates']}, and is measured on "
        "it again, which flatters it: take images that had no part in the choice"
    )
    if chosen["generation_seed"] == fake["generation_seed"]:
        message += f", and draw with another --generation-seed than {fake['generation_seed']}"
    warnings.warn(message, stacklevel=2)


def selection_line(identity: Identity) -> str | None:
    """On what the checkpoint was chosen, in a line; None where it was not."""
    chosen = identity.get("selected_on")
    if not chosen:
        return None
    where = chosen["path"] or "a set that the run did not record"
    return f"{identity['checkpoint']} was chosen on {where}: the best {chosen['metric']} of {chosen['candidates']}"
