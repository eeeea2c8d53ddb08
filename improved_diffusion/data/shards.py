"""Sets too large for memory or disk: WebDataset shards, in a folder, behind a web server, or in an object store.

A sharded set is a folder of tar files with one WebDataset sample each, `images.npy` (n, H, W, C) uint8 and `labels.npy`
(n,) int64, and `index.json`, which names them. The images are shuffled before they are divided, so that a shard is a
random sample of the set.
"""

from __future__ import annotations

import hashlib
import io
import json
import shutil
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from improved_diffusion.data.image_set import ImageSet, is_image_set, open_image_set
from improved_diffusion.data.packing import new_directory
from improved_diffusion.data.sums import array_sha256
from improved_diffusion.errors import UserError
from improved_diffusion.progress import progress

INDEX = "index.json"
MAKE = "`python -m improved_diffusion.data shard`"
FORMAT_VERSION = 1
ATTEMPTS = 3  # to read a file: a connection may break, and Ctrl-C reaches the programs that WebDataset reads through
SECONDS_BETWEEN_ATTEMPTS = 1.0


@dataclass(frozen=True)
class Shard:
    """A tar file of a sharded set."""

    name: str
    count: int  # images
    sha256: str  # over the sums of both arrays


@dataclass(frozen=True)
class ShardedSet:
    """N images of one size, with their classes, in shards that are read one at a time."""

    path: str  # of the folder, or its URL
    image_shape: tuple[int, int, int]  # (H, W, C)
    class_names: tuple[str, ...]
    split: str
    shards: tuple[Shard, ...]

    def __len__(self) -> int:
        return sum(shard.count for shard in self.shards)

    @property
    def content_hash(self) -> str:
        """SHA-256 hex of all shards, in their order, and of the class names."""
        sums = [shard.sha256 for shard in self.shards]
        return hashlib.sha256(json.dumps([sums, list(self.class_names)]).encode()).hexdigest()

    def read(self, number: int) -> tuple[np.ndarray, np.ndarray]:
        """The images, uint8 (n, H, W, C), and labels, int64 (n,), of a shard.

        Raises:
            UserError: it cannot be read, or is not what the index says.
        """
        shard, webdataset = self.shards[number], require_webdataset()
        url = _url(self.path, shard.name)
        pipeline = webdataset.DataPipeline(webdataset.SimpleShardList([url]), webdataset.tarfile_to_samples())
        sample = _attempt(lambda: next(iter(pipeline)), url)
        try:
            images, labels = (
                np.load(io.BytesIO(sample[name]), allow_pickle=False) for name in ("images.npy", "labels.npy")
            )
        except (KeyError, ValueError, EOFError) as error:
            raise UserError(f"{url} is no shard of this project, or damaged: {error}") from error
        if _sum(images, labels) != shard.sha256:
            raise UserError(f"{url} does not match its SHA-256 in {INDEX}: it was changed, or damaged on its way")
        return images, labels


def _url(path: str | Path, name: str) -> str:
    """Where a file of the set lies: below a URL, or an absolute path, in which no colon is taken for a URL's."""
    return f"{path if '://' in str(path) else Path(path).absolute()}/{name}"


def is_sharded_set(path: str | Path) -> bool:
    """Whether `path` is a URL, which only a sharded set may have, or a folder that looks like one."""
    return "://" in str(path) or (Path(path) / INDEX).is_file()


def open_sharded_set(path: str | Path) -> ShardedSet:
    """The sharded set at a path or URL, of which only the index is read.

    Raises:
        UserError: the index cannot be read, or the extra `streaming` is not installed.
    """
    url = _url(path, INDEX)
    gopen = require_webdataset().gopen

    def read() -> bytes:
        with gopen(url) as stream:
            return stream.read()

    text = _attempt(read, url)
    try:
        index = json.loads(text)
        if index.pop("format_version") != FORMAT_VERSION:
            raise ValueError(f"its format version is not {FORMAT_VERSION}")
        shards = tuple(Shard(**shard) for shard in index.pop("shards"))
        if not shards or not all(isinstance(shard.count, int) and shard.count > 0 for shard in shards):
            raise ValueError("it names no shards, or some without images")
        shape, names = tuple(index.pop("image_shape")), tuple(index.pop("class_names"))
        return ShardedSet(str(path), image_shape=shape, class_names=names, shards=shards, **index)
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise UserError(f"{url} is no index of a sharded set: {error}; make one with {MAKE}") from error


def open_training_set(path: str | Path) -> ImageSet | ShardedSet:
    """The packed or sharded set at `path`. Raises UserError as `open_image_set` and `open_sharded_set` do."""
    return open_sharded_set(path) if is_sharded_set(path) else open_image_set(path)


def write_shards(image_set: ImageSet, out: Path, shard_bytes: int, seed: int = 0) -> ShardedSet:
    """Divide the images, in an order drawn from `seed`, into shards of about `shard_bytes`, of equal numbers of images
    but for one; packed sets inside the set's folder (val, test) are copied.

    Raises:
        UserError: `out` is taken or cannot be written, or the extra `streaming` is not installed.
    """
    writer = require_webdataset().TarWriter
    count = len(image_set)
    order = np.random.Generator(np.random.PCG64(seed)).permutation(count)
    number_of_shards = max(1, round(image_set.images.nbytes / shard_bytes))
    shards = []
    with new_directory(out, overwrite=False) as directory:
        parts = np.array_split(order, min(count, number_of_shards))
        for number, part in enumerate(progress(iterable=parts, desc="writing shards", unit="shard")):
            rows = np.sort(part)  # as they lie on the disk; who reads them shuffles them
            images, labels = image_set.images[rows], image_set.labels[rows]
            shard = Shard(f"{number:06d}.tar", len(rows), _sum(images, labels))
            with writer(str(directory / shard.name)) as tar:
                tar.write({"__key__": f"{number:06d}", "images.npy": images, "labels.npy": labels})
            shards.append(shard)
        sharded = ShardedSet(str(out), image_set.image_shape, image_set.class_names, image_set.split, tuple(shards))
        index: dict[str, Any] = {"format_version": FORMAT_VERSION, **asdict(sharded)}
        del index["path"]
        (directory / INDEX).write_text(json.dumps(index, indent=1) + "\n", encoding="utf-8")
        for inside in image_set.path.iterdir():
            if is_image_set(inside):
                shutil.copytree(inside, directory / inside.name)
    return sharded


# ----------------------------------------------------------------------------------------------------------------------
# Files


def _sum(images: np.ndarray, labels: np.ndarray) -> str:
    return hashlib.sha256((array_sha256(images) + array_sha256(labels)).encode()).hexdigest()


def require_webdataset() -> ModuleType:
    """The library, which only sharded sets need.

    Raises:
        UserError: it is not installed.
    """
    try:
        import webdataset
    except ImportError as error:
        raise UserError("sharded sets need WebDataset: in the checkout, pip install -e '.[streaming]'") from error
    return webdataset


def _attempt(read: Callable[[], Any], url: str) -> Any:
    """What `read` gives, which is tried `ATTEMPTS` times.

    Raises:
        UserError: it failed each time.
    """
    for attempt in range(ATTEMPTS):
        if attempt:
            time.sleep(SECONDS_BETWEEN_ATTEMPTS)
        try:
            return read()
        except Exception as error:  # WebDataset's are of any class, by the program that it reads through
            failure = error
    reason = str(failure).strip() or type(failure).__name__
    raise UserError(f"cannot read {url}: {reason.splitlines()[0][:200]}") from failure
