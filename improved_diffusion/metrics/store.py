"""Extracting the features of a set of images, bounded in memory and safe from interruption.

Features go to disk in chunks, each written whole or not at all and named by the images that it is of. So an extraction
that was killed goes on with the images that are missing, however many processes share them now. The finished store is a
single array, opened memory-mapped; it is found again by the content of the images and every setting.

    features/KEY/chunk_0_512.npz ...    while it grows: features, indices, broken, of images 0 to 511
    features/KEY/rows.json              once complete: indices of the images, and which are left out
    features/KEY/features.npy           float32 (n, d)
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import math
import re
import time
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from improved_diffusion.cache import cache_directory
from improved_diffusion.errors import UserError
from improved_diffusion.files import atomic_write, write_text
from improved_diffusion.metrics.features import Features, finite
from improved_diffusion.metrics.images.sources import Source
from improved_diffusion.metrics.inception.extractor import FeatureExtractor, FeatureSettings
from improved_diffusion.progress import progress
from improved_diffusion.runtime.devices import Processes

CHUNK = 512  # images
LEFT_BEHIND = 3600  # seconds after which a file that is half-written has been left by a kill
CHUNK_NAME = re.compile(r"chunk_(\d+)_(\d+)\.npz")
MAX_BROKEN = 0.02  # of the images; beyond it the set is not the one that was meant
COMPILE_FROM = 5000  # images still to do on a CPU; below, compiling takes longer than it saves, as it does on a GPU


@dataclass(frozen=True)
class FeatureStore:
    """Features of one size, of one set of images, in a directory of their own."""

    directory: Path

    def chunk_file(self, chunk: range) -> Path:
        """Where the features of the images of these numbers go."""
        return self.directory / f"chunk_{chunk.start}_{chunk.stop}.npz"

    @property
    def is_complete(self) -> bool:
        return (self.directory / "features.npy").is_file()

    def write_chunk(self, chunk: range, features: np.ndarray, indices: np.ndarray, broken: dict[int, str]) -> None:
        with atomic_write(self.chunk_file(chunk)) as temporary, temporary.open("wb") as file:
            np.savez(file, features=features, indices=indices, broken=np.str_(json.dumps(broken)))

    def read_chunk(self, chunk: range) -> tuple[np.ndarray, np.ndarray, dict[int, str]] | None:
        """Features, indices and what is broken; None where the chunk is missing or damaged."""
        try:
            with np.load(self.chunk_file(chunk), allow_pickle=False) as arrays:
                broken = {int(index): reason for index, reason in json.loads(str(arrays["broken"])).items()}
                return arrays["features"], arrays["indices"], broken
        except Exception:  # numpy and zipfile raise almost anything on a damaged file
            return None

    def chunks(self) -> set[range]:
        """Those that are there and whole."""
        names = [CHUNK_NAME.fullmatch(file.name) for file in self.directory.glob("chunk_*.npz")]
        return {chunk for name in names if name and self._is_whole(chunk := range(int(name[1]), int(name[2])))}

    def _is_whole(self, chunk: range) -> bool:
        content = self.read_chunk(chunk)
        return content is not None and sorted({*content[1].tolist(), *content[2]}) == list(chunk)

    def finish(self, chunks: Sequence[range], size: int) -> None:
        """Join the chunks, which are those of all images in order, into one array, in bounded memory.

        Raises:
            UserError: one of them is missing, and no other command has finished meanwhile.
        """
        try:
            self._join(chunks, size)
        except UserError:
            if not self.is_complete:
                raise

    def remove_leftovers(self) -> None:
        """Remove the chunks, and what kills left of files, of a complete store. A new file that is half-written may be
        another command's, which would fail without it."""
        for file in self.directory.glob("chunk_*.npz"):
            file.unlink(missing_ok=True)
        for file in self.directory.glob(".*.tmp"):
            with contextlib.suppress(FileNotFoundError):
                if time.time() - file.stat().st_mtime > LEFT_BEHIND:
                    file.unlink()

    def _join(self, chunks: Sequence[range], size: int) -> None:
        parts = [self._chunk_rows(chunk) for chunk in chunks]
        n = sum(len(indices) for indices, _ in parts)
        rows = {
            "indices": np.concatenate([indices for indices, _ in parts]).tolist(),
            "broken": {index: reason for _, broken in parts for index, reason in broken.items()},
        }
        write_text(self.directory / "rows.json", json.dumps(rows))
        with atomic_write(self.directory / "features.npy") as temporary, temporary.open("wb") as file:
            header = {"descr": "<f4", "fortran_order": False, "shape": (n, size)}
            np.lib.format.write_array_header_1_0(file, header)
            for chunk in chunks:
                file.write(np.ascontiguousarray(self._chunk(chunk)[0], dtype="<f4").data)

    def _chunk(self, chunk: range) -> tuple[np.ndarray, np.ndarray, dict[int, str]]:
        content = self.read_chunk(chunk)
        if content is None:
            raise UserError(f"{self.chunk_file(chunk)} disappeared or was damaged: run the same command again")
        return content

    def _chunk_rows(self, chunk: range) -> tuple[np.ndarray, dict[int, str]]:
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
    incomplete = {size: store for size, store in stores.items() if not store.is_complete}
    if processes.gather(bool(incomplete))[0]:
        # The first process looks what is there, for all: others might find more, which another command writes.
        there = set.intersection(*(store.chunks() for store in incomplete.values())) if processes.is_first else set()
        chunks, missing = processes.gather(divide(len(source), there, processes.world_size))[0]
        share = missing[processes.rank :: processes.world_size]
        problem = None
        try:
            _extract(share, source, extractor, incomplete, batch_size, show_progress=processes.is_first)
        except UserError as error:  # the others would wait for this process for ever
            problem = str(error)
        if problems := [problem for problem in processes.gather(problem) if problem]:
            raise UserError(problems[0])
        if processes.is_first:
            for size, store in incomplete.items():
                store.finish(chunks, size)
            for store in stores.values():
                store.remove_leftovers()
        processes.gather(None)
    opened = {size: _open(source, extractor.settings(size), store) for size, store in stores.items()}
    if processes.is_first:
        _warn_of_broken(source.name, len(source), stores[extractor.features[0]].open()[2])
    return opened


def divide(count: int, there: Iterable[range], processes: int) -> tuple[list[range], list[range]]:
    """Divide `count` images into chunks.

    Of the chunks that are `there` those are kept that do not overlap. The images between them are divided so that each
    of the `processes` has as many to do: chunks of up to `CHUNK` images, and of fewer where some would be idle.

    Returns:
        All chunks, in order, and those that are missing.
    """
    kept: list[range] = []
    for chunk in sorted(there, key=_start):
        if chunk.start >= (kept[-1].stop if kept else 0) and chunk.stop <= count:
            kept.append(chunk)
    ends, starts = [0, *(chunk.stop for chunk in kept)], [*map(_start, kept), count]
    gaps = [range(end, start) for end, start in zip(ends, starts, strict=True)]
    todo = sum(map(len, gaps))
    rounds = math.ceil(todo / (CHUNK * processes))
    size = math.ceil(todo / (rounds * processes)) if todo and processes > 1 else CHUNK
    missing = [gap[first : first + size] for gap in gaps for first in range(0, len(gap), size)]
    return sorted([*kept, *missing], key=_start), missing


def _start(chunk: range) -> int:
    return chunk.start


def _extract(
    chunks: Sequence[range],
    source: Source,
    extractor: FeatureExtractor,
    stores: dict[int, FeatureStore],
    batch_size: int | None,
    show_progress: bool,
) -> None:
    """Compute the features of the images of `chunks` and write them to the stores of their sizes."""
    todo = sum(map(len, chunks))
    if todo >= COMPILE_FROM and extractor.device.type == "cpu" and batch_size is None:
        extractor.compile()
    bar = progress(total=todo, desc=f"features of {source.name}", unit="image", disable=not show_progress or not todo)
    with bar:
        for chunk in chunks:
            features: dict[int, list[np.ndarray]] = {size: [] for size in extractor.features}
            indices: list[np.ndarray] = []
            for batch in source.batches(batch_size or extractor.batch_size, chunk.start, chunk.stop):
                for size, feature in extractor(batch.images).items():
                    features[size].append(finite(feature, source.name))
                indices.append(batch.indices)
                bar.update(len(batch.indices))
            broken = {index: reason for index, reason in source.broken.items() if index in chunk}
            bar.update(len(broken))
            _check_broken(source.name, len(source), source.broken)
            for size, store in stores.items():
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
