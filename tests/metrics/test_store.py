"""Extraction: whatever is interrupted, divided or reordered, the features are the same."""

from __future__ import annotations

import json
import math
import os
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from improved_diffusion.errors import UserError
from improved_diffusion.metrics import FeatureExtractor, extract_features, features_of_batches, open_source, store
from improved_diffusion.metrics.images.sources import ArraySource
from improved_diffusion.metrics.store import FeatureStore, divide, open_store
from improved_diffusion.runtime.devices import Processes

ROOT = Path(__file__).parents[2]
CPU = torch.device("cpu")
TOLERANCE = {"rtol": 1e-6, "atol": 1e-7}


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    monkeypatch.setattr(store, "CHUNK", 5)


@pytest.fixture
def source(photos) -> ArraySource:
    return ArraySource("photos", photos, np.arange(12) % 3, ("a", "b", "c"))


@pytest.fixture(scope="module")
def expected(extractor64, photos) -> np.ndarray:
    return extractor64(photos)[64].numpy()


def test_rows_are_the_images_in_order(source, extractor64, expected, cache):
    features = extract_features(source, extractor64)[64]
    np.testing.assert_allclose(features.array, expected, **TOLERANCE)
    assert (features.n, features.d, features.skipped) == (12, 64, 0)
    assert features.labels.tolist() == source.labels.tolist()
    assert features.settings == extractor64.settings(64)
    files = sorted(file.name for file in (cache / "features").rglob("*") if file.is_file())
    assert files == ["features.npy", "rows.json"]  # no chunk stays, and no temporary file


@pytest.mark.parametrize("batch_size", [1, 3, 100])
def test_neither_the_batch_nor_the_chunk_matters(source, extractor64, expected, batch_size):
    features = extract_features(source, extractor64, batch_size)[64]
    np.testing.assert_allclose(features.array, expected, **TOLERANCE)


def test_what_is_there_is_not_computed_again(source, photos, extractor64, unusable):
    first = extract_features(source, extractor64)[64]
    again = extract_features(ArraySource("elsewhere", photos.copy()), unusable(extractor64))[64]
    np.testing.assert_array_equal(again.array, first.array)
    with pytest.raises(AssertionError, match="the network ran"):
        extract_features(ArraySource("reversed", photos[::-1]), unusable(extractor64))
    with pytest.raises(AssertionError, match="the network ran"):
        extract_features(source, unusable(extractor64, weights_hash="others"))


def test_several_sizes_in_one_pass(photos, extractor, extractor64, unusable):
    source = ArraySource("photos", photos[:3])
    together = extract_features(source, extractor)
    assert {size: features.d for size, features in together.items()} == {64: 64, 192: 192, 768: 768, 2048: 2048}
    np.testing.assert_array_equal(extract_features(source, unusable(extractor64))[64].array, together[64].array)


class Interrupted(ArraySource):
    """Fails when image 7 is read."""

    def batches(self, batch_size, start=0, stop=None):
        for batch in super().batches(batch_size, start, stop):
            if 7 in batch.indices:
                raise KeyboardInterrupt
            yield batch


class OnlyFrom(ArraySource):
    """May not be read below image 5."""

    def batches(self, batch_size, start=0, stop=None):
        assert start >= 5
        return super().batches(batch_size, start, stop)


def test_an_interrupted_extraction_goes_on_where_it_stopped(photos, extractor64, expected):
    with pytest.raises(KeyboardInterrupt):
        extract_features(Interrupted("photos", photos), extractor64)
    features = extract_features(OnlyFrom("photos", photos), extractor64)[64]
    np.testing.assert_allclose(features.array, expected, **TOLERANCE)


def test_a_damaged_chunk_is_computed_anew(photos, extractor64, expected):
    with pytest.raises(KeyboardInterrupt):
        extract_features(Interrupted("photos", photos), extractor64)
    file = open_store(ArraySource("photos", photos), extractor64.settings(64)).chunk_file(range(5))
    file.write_bytes(file.read_bytes()[:100])
    features = extract_features(ArraySource("photos", photos), extractor64)[64]
    np.testing.assert_allclose(features.array, expected, **TOLERANCE)


def test_a_damaged_store_says_what_to_remove(source, extractor64, cache):
    extract_features(source, extractor64)
    (file,) = (cache / "features").rglob("features.npy")
    file.write_bytes(file.read_bytes()[:200])
    with pytest.raises(UserError, match=r"damaged .* remove that folder"):
        extract_features(source, extractor64)


def test_processes_divide_the_chunks(source, extractor64, expected):
    """Two, one after the other: the second finds what the first left to it."""

    class Stopped(Exception):
        pass

    class First(Processes):
        def gather(self, value):
            if value is None:  # no problem with its share
                raise Stopped
            return [value]

    with pytest.raises(Stopped):
        extract_features(source, extractor64, processes=First(CPU, rank=0, world_size=2))
    chunks = open_store(source, extractor64.settings(64))
    assert chunks.chunks() == {range(3), range(6, 9)}
    features = extract_features(source, extractor64)[64]
    np.testing.assert_allclose(features.array, expected, **TOLERANCE)


def test_a_problem_of_one_process_is_the_error_of_all(source, extractor64):
    class Fine(Processes):
        def gather(self, value):
            return [value, "the other has no disk left"] if value is None else [value]

    with pytest.raises(UserError, match="no disk left"):
        extract_features(source, extractor64, processes=Fine(CPU))


def test_two_commands_may_finish_the_same_set(source, extractor64, expected, monkeypatch):
    """The other one has joined the chunks and removed them before this one comes to it."""
    join = FeatureStore._join

    def late(self, chunks, size):
        join(self, chunks, size)
        self.remove_leftovers()
        join(self, chunks, size)

    monkeypatch.setattr(FeatureStore, "_join", late)
    features = extract_features(source, extractor64)[64]
    np.testing.assert_allclose(features.array, expected, **TOLERANCE)


def test_chunks_of_another_size_are_not_taken_for_whole(photos, extractor64, expected, monkeypatch):
    with pytest.raises(KeyboardInterrupt):
        extract_features(Interrupted("photos", photos), extractor64)
    monkeypatch.setattr(store, "CHUNK", 8)
    features = extract_features(ArraySource("photos", photos), extractor64)[64]
    np.testing.assert_allclose(features.array, expected, **TOLERANCE)


@pytest.mark.parametrize(
    ("count", "processes", "sizes"),
    [(2020, 1, [512, 512, 512, 484]), (2020, 8, [253] * 7 + [249]), (50_000, 8, [481] * 103 + [457]), (5, 8, [1] * 5)],
)
def test_chunks_fit_the_number_of_processes(monkeypatch, count, processes, sizes):
    monkeypatch.setattr(store, "CHUNK", 512)
    chunks, missing = divide(count, [], processes)
    assert chunks == missing
    assert [len(chunk) for chunk in chunks] == sizes


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])  # the fixtures of this file are alike each time
@given(count=st.integers(2, 200), processes=st.integers(1, 9), cuts=st.sets(st.integers(0, 200)))
def test_what_is_there_is_kept_and_the_rest_is_shared(count, processes, cuts):
    """However many processes, of whatever earlier commands, have left it; chunks here are of 5 images."""
    ends = sorted({min(cut, count) for cut in cuts})
    there = {range(start, stop) for start, stop in zip(ends[::2], ends[1::2], strict=False)}
    chunks, missing = divide(count, there, processes)
    assert [index for chunk in chunks for index in chunk] == list(range(count))
    assert {*chunks} - {*missing} == there
    assert max(map(len, missing), default=0) <= 5
    if not there:
        loads = [sum(map(len, missing[rank::processes])) for rank in range(processes)]
        assert max(loads) <= 5 * math.ceil(count / (5 * processes))


def test_of_chunks_that_overlap_one_is_kept():
    chunks, missing = divide(12, [range(0, 4), range(3, 6), range(4, 8), range(10, 15)], 1)
    assert chunks == [range(0, 4), range(4, 8), range(8, 12)]
    assert missing == [range(8, 12)]


def test_other_processes_go_on_where_one_was_killed(photos, extractor64, expected):
    with pytest.raises(KeyboardInterrupt):
        extract_features(Interrupted("photos", photos), extractor64)

    class Last(Processes):
        def gather(self, value):
            if value is not None:
                return [value] if isinstance(value, bool) else [divide(12, {range(5)}, 3)]
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        extract_features(OnlyFrom("photos", photos), extractor64, processes=Last(CPU, rank=2, world_size=3))
    chunks = open_store(ArraySource("photos", photos), extractor64.settings(64)).chunks()
    assert chunks == {range(5), range(11, 12)}  # of 7 images 3, 3 and 1
    features = extract_features(OnlyFrom("photos", photos), extractor64)[64]
    np.testing.assert_allclose(features.array, expected, **TOLERANCE)


def test_chunks_of_an_older_version_are_begun_anew(source, extractor64, expected):
    directory = open_store(source, extractor64.settings(64)).directory
    directory.mkdir(parents=True)
    np.savez(directory / "chunk_00000.npz", features=np.zeros((5, 64)), indices=np.arange(5), broken=np.str_("{}"))
    features = extract_features(source, extractor64)[64]
    np.testing.assert_allclose(features.array, expected, **TOLERANCE)
    assert sorted(file.name for file in directory.iterdir()) == ["features.npy", "rows.json"]


def test_features_that_are_not_finite_name_the_set(weights, source):
    broken = FeatureExtractor((64,), weights=weights)
    broken.network.Conv2d_1a_3x3.bias[0] = float("nan")
    with pytest.raises(UserError, match=r"photos: .* NaN"):
        extract_features(source, broken)


def test_a_cache_that_cannot_be_written_is_one_line(source, extractor64, cache):
    cache.write_text("a file where the directory should be")
    with pytest.raises(UserError, match="could not write .*cache"):
        extract_features(source, extractor64)


def write_images(folder: Path, photos: np.ndarray, count: int) -> Path:
    folder.mkdir()
    for i in range(count):
        Image.fromarray(photos[i % 12]).save(folder / f"{i:03}.png")
    return folder


def test_broken_images_are_left_out_counted_and_named(tmp_path, photos, extractor64, expected):
    folder = write_images(tmp_path / "images", photos, 60)
    (folder / "003.png").write_bytes((folder / "003.png").read_bytes()[:-40])
    for _ in range(2):  # extracted, and from the store
        with pytest.warns(UserWarning, match=r"skipped 1 of 60 .*003\.png"):
            features = extract_features(open_source(folder), extractor64)[64]
        assert (features.n, features.skipped) == (59, 1)
        assert features.image_index(3) == 4
        np.testing.assert_allclose(features.array[:3], expected[:3], **TOLERANCE)
        np.testing.assert_allclose(features.array[3], expected[4], **TOLERANCE)


def test_more_than_two_percent_broken_is_an_error(tmp_path, photos, extractor64):
    folder = write_images(tmp_path / "images", photos, 60)
    for name in ("003.png", "040.png"):
        (folder / name).write_bytes(b"\x00\x00\x00\x18ftypmp42 a film")
    with pytest.raises(UserError, match=r"2 of its 60 images cannot be decoded .* 2%; the first is 003\.png"):
        extract_features(open_source(folder), extractor64)


def test_images_that_are_too_small(extractor64):
    with pytest.raises(UserError, match="1x1 pixels"):
        extract_features(ArraySource("dots", np.zeros((9, 1, 1, 3), np.uint8)), extractor64)


def test_batches_from_anywhere_are_kept_in_memory(photos, extractor64, expected, cache):
    batches = (torch.from_numpy(photos[start : start + 5]) for start in range(0, 12, 5))
    features = features_of_batches("mine", batches, extractor64)[64]
    np.testing.assert_allclose(features.array, expected, **TOLERANCE)
    assert not cache.exists()
    with pytest.raises(UserError, match="fewer than 2"):
        features_of_batches("none", [photos[:1]], extractor64)


def test_killed_and_run_again_as_a_command(tmp_path, photos, weights, cache, start_script, finish_script):
    """kill -9 in the middle, then the same command by two processes; against one that nothing disturbed."""
    images = np.concatenate([np.roll(photos, shift, axis=1) for shift in range(3)])
    np.save(tmp_path / "real.npy", images)
    np.save(tmp_path / "fake.npy", images[::-1, ::-1][:12])
    sets = (tmp_path / "real.npy", tmp_path / "fake.npy")
    command = ("fid.py", *sets, "--features", 64, "--weights", weights, "--metrics", "fid", "kid", "--json")
    started = start_script(*command, tmp_path / "x.json")
    started.wait_for(lambda: list(cache.rglob("chunk_*.npz")))
    assert started.send(signal.SIGKILL).code == -signal.SIGKILL
    results = []
    for name, directory, processes in [("two", cache, 2), ("one", tmp_path / "other", 1)]:
        output = tmp_path / f"{name}.json"
        where = {"IMPROVED_DIFFUSION_CACHE": str(directory)}
        finish_script(*command, output, processes=processes, environment=where)
        results.append([part["value"] for part in json.loads(output.read_text())["measurements"]])
    np.testing.assert_allclose(results[0], results[1], rtol=1e-6)


def test_what_another_command_is_writing_stays(source, extractor64):
    extract_features(source, extractor64)
    chunks = open_store(source, extractor64.settings(64))
    new, old = chunks.directory / ".features.npy.new.tmp", chunks.directory / ".features.npy.old.tmp"
    for file in (new, old):
        file.touch()
    os.utime(old, (0, 0))
    chunks.remove_leftovers()
    assert new.exists()
    assert not old.exists()
