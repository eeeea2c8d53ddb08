"""Extracting the features of a set of images, bounded in memory and safe from interruption.

Features go to disk in chunks, each written whole or not at all, so that an extraction that was killed goes on with
the chunks that are missing, and several processes can share one. The finished store is a single array, opened
memory-mapped; it is found again by the content of the images and every setting.

    features/KEY/chunk_00000.npz ...    while it grows: features, indices, broken
    features/KEY/rows.json              once complete: indices of the images, and which are left out
    features/KEY/features.npy           float32 (n, d)
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import warnings
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from improved_diffusion.errors import UserError
from improved_diffusion.files import atomic_write
from improved_diffusion.metrics.cache import cache_directory
from improved_diffusion.metrics.features import Features, finite
from improved_diffusion.metrics.images.sources import Source
from improved_diffusion.metrics.inception.extractor import FeatureExtractor, FeatureSettings
from improved_diffusion.progress import progress
from improved_diffusion.runtime.devices import Processes

CHUNK = 512  # images
MAX_BROKEN = 0.02  # of the images; beyond it the set is not the one that was meant
COMPILE_FROM = 5000  # images still to do on a CPU; below, compiling takes longer than it saves, as it does on a GPU


@dataclass(frozen=True)
class FeatureStore:
    """Features of one size, of one set of images, in a directory of their own."""

    directory: Path

    def chunk_file(self, chunk: int) -> Path:
        return self.directory / f"chunk_{chunk:05d}.npz"

    @property
    def is_complete(self) -> bool:
        return (self.directory / "features.npy").is_file()

    def write_chunk(self, chunk: int, features: np.ndarray, indices: np.ndarray, broken: dict[int, str]) -> None:
        with atomic_write(self.chunk_file(chunk)) as temporary, temporary.open("wb") as file:
            np.savez(file, features=features, indices=indices, broken=np.str_(json.dumps(broken)))

    def read_chunk(self, chunk: int) -> tuple[np.ndarray, np.ndarray, dict[int, str]] | None:
        """Features, indices and what is broken; None where the chunk is missing or damaged."""
        try:
            with np.load(self.chunk_file(chunk), allow_pickle=False) as arrays:
                broken = {int(index): reason for index, reason in json.loads(str(arrays["broken"])).items()}
                return arrays["features"], arrays["indices"], broken
        except Exception:  # numpy and zipfile raise almost anything on a damaged file
            return None

    def has_chunk(self, chunk: int, images: range) -> bool:
        """Whether the chunk is there, whole, and of these images."""
        content = self.read_chunk(chunk)
        return content is not None and sorted({*content[1].tolist(), *content[2]}) == list(images)

    def finish(self, chunks: int, size: int) -> None:
        """Join the chunks into one array, in bounded memory.

        Raises:
            UserError: one of them is missing, and no other command has finished meanwhile.
        """
        try:
            self._join(chunks, size)
        except UserError:
            if not self.is_complete:
                raise

    def remove_leftovers(self) -> None:
        """Remove the chunks, and what kills left of files, of a complete store."""
        for file in [*self.directory.glob("chunk_*.npz"), *self.directory.glob(".*.tmp")]:
            file.unlink(missing_ok=True)

    def _join(self, chunks: int, size: int) -> None:
        parts = [self._chunk_rows(chunk) for chunk in range(chunks)]
        n = sum(len(indices) for indices, _ in parts)
        rows = {
            "indices": np.concatenate([indices for indices, _ in parts]).tolist(),
            "broken": {index: reason for _, broken in parts for index, reason in broken.items()},
        }
        with atomic_write(self.directory / "rows.json") as temporary:
            temporary.write_text(json.dumps(rows))
        with atomic_write(self.directory / "features.npy") as temporary, temporary.open("wb") as file:
            header = {"descr": "<f4", "fortran_order": False, "shape": (n, size)}
            np.lib.format.write_array_header_1_0(file, header)
            for chunk in range(chunks):
                file.write(np.ascontiguousarray(self._chunk(chunk)[0], dtype="<f4").data)

    def _chunk(self, chunk: int) -> tuple[np.ndarray, np.ndarray, dict[int, str]]:
        content = self.read_chunk(chunk)
        if content is None:
            raise UserError(f"{self.chunk_file(chunk)} disappeared or was damaged: run the same command again")
        return content

    def _chunk_rows(self, chunk: int) -> tuple[np.ndarray, dict[int, str]]:
        _, indices, broken = self._chunk(chunk)
        return indices, broken

    def open(self) -> tuple[np.ndarray, np.ndarray, dict[int, str]]:
        """Of a complete store: features (n, d), memory-mapped; the indices of their images (n,); what is broken.

        Raises:
            UserError: the files are damaged.
        """
        try:
            rows = json.loads((self.directory / "rows.json").read_text())
            array = np.load(self.directory / "features.npy", mmap_mode="r", allow_pickle=False)
            indices = np.array(rows["indices"], dtype=np.int64)
            broken = {int(index): reason for index, reason in rows["broken"].items()}
            if array.ndim != 2 or len(array) != len(indices):
                raise ValueError(f"{array.shape} features of {len(indices)} images")
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(f"the features in {self.directory} are damaged ({error}): remove that folder") from error
        return array, indices, broken


def open_store(source: Source, settings: FeatureSettings) -> FeatureStore:
    """The store of `source` in the cache directory, complete, begun or still empty."""
    key = json.dumps({"content": source.content_hash, **dataclasses.asdict(settings)}, sort_keys=True)
    return FeatureStore(cache_directory() / "features" / hashlib.sha256(key.encode()).hexdigest()[:32])


def extract_features(
    source: Source,
    extractor: FeatureExtractor,
    batch_size: int | None = None,
    processes: Processes | None = None,
) -> dict[int, Features]:
    """The features of all images of `source`, in one pass, or as many as are not in the store yet.

    Args:
        source: what to measure.
        extractor: with the feature sizes that are wanted.
        batch_size: images per network call; by default what suits the device.
        processes: those that share the work, on one machine or at least one cache directory.

    Returns:
        {feature size: features}. Images that cannot be read are left out with a warning that names the first.

    Raises:
        UserError: more than 2 % of the images cannot be read, fewer than two can; features that are not finite; a disk
            that is full.
    """
    processes = processes or Processes(extractor.device)
    stores = {size: open_store(source, extractor.settings(size)) for size in extractor.features}
    chunks = -(-len(source) // CHUNK)
    complete = processes.gather(all(store.is_complete for store in stores.values()))[0]
    if not complete:
        problem = None
        try:
            _extract_missing(source, extractor, stores, batch_size, processes)
        except UserError as error:  # the others would wait for this process for ever
            problem = str(error)
        if problems := [problem for problem in processes.gather(problem) if problem]:
            raise UserError(problems[0])
        if processes.rank == 0:
            for size, store in stores.items():
                if not store.is_complete:
                    store.finish(chunks, size)
                store.remove_leftovers()
        processes.gather(None)
    opened = {size: _open(source, extractor.settings(size), store) for size, store in stores.items()}
    if processes.rank == 0:
        _warn_of_broken(source.name, len(source), stores[extractor.features[0]].open()[2])
    return opened


def _extract_missing(
    source: Source,
    extractor: FeatureExtractor,
    stores: dict[int, FeatureStore],
    batch_size: int | None,
    processes: Processes,
) -> None:
    """This process's share of the chunks that some of the stores lack."""
    incomplete = {size: store for size, store in stores.items() if not store.is_complete}
    starts = range(0, len(source), CHUNK)
    share = list(enumerate(starts))[processes.rank :: processes.world_size]
    missing = [
        (chunk, start)
        for chunk, start in share
        if not all(
            store.has_chunk(chunk, range(start, min(start + CHUNK, len(source)))) for store in incomplete.values()
        )
    ]
    todo = sum(min(CHUNK, len(source) - start) for _, start in missing)
    if todo >= COMPILE_FROM and extractor.device.type == "cpu" and batch_size is None:
        extractor.compile()
    with progress(
        total=sum(min(CHUNK, len(source) - start) for _, start in share),
        initial=sum(min(CHUNK, len(source) - start) for _, start in share) - todo,
        desc=f"features of {source.name}",
        unit="image",
        disable=processes.rank > 0 or not todo,
    ) as bar:
        for chunk, start in missing:
            stop = min(start + CHUNK, len(source))
            features: dict[int, list[np.ndarray]] = {size: [] for size in extractor.features}
            indices: list[np.ndarray] = []
            for batch in source.batches(batch_size or extractor.batch_size, start, stop):
                for size, feature in extractor(batch.images).items():
                    features[size].append(finite(feature, source.name))
                indices.append(batch.indices)
                bar.update(len(batch.indices))
            broken = {index: reason for index, reason in source.broken.items() if start <= index < stop}
            bar.update(len(broken))
            _check_broken(source.name, len(source), source.broken)
            for size, store in incomplete.items():
                rows = np.concatenate([np.empty((0, size), np.float32), *features[size]])
                store.write_chunk(chunk, rows, np.concatenate([np.empty(0, np.int64), *indices]), broken)


def _open(source: Source, settings: FeatureSettings, store: FeatureStore) -> Features:
    array, indices, broken = store.open()
    _check_broken(source.name, len(source), broken)
    if len(array) < 2:
        raise UserError(f"{source.name} has {len(array)} readable images: at least 2 are needed")
    return Features(
        name=source.name,
        array=array,
        settings=settings,
        labels=None if source.labels is None else np.asarray(source.labels)[indices],
        class_names=source.class_names,
        indices=indices,
        skipped=len(broken),
        content_hash=source.content_hash,
    )


def _check_broken(name: str, count: int, broken: dict[int, str]) -> None:
    if len(broken) > MAX_BROKEN * count:
        raise UserError(
            f"{name}: {len(broken)} of its {count:,} images cannot be decoded so far, more than {MAX_BROKEN:.0%}; the "
            f"first is {next(iter(broken.values()))}; mend or remove them"
        )


def _warn_of_broken(name: str, count: int, broken: dict[int, str]) -> None:
    if broken:
        warnings.warn(
            f"{name}: skipped {len(broken)} of {count:,} images that cannot be decoded, the first is "
            f"{next(iter(broken.values()))}",
            stacklevel=3,
        )
