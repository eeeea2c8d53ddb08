"""Training data by streaming: `python benchmarks/streaming.py [--images 20000] [--image-size 64] [--batch-size 64]`.

Images/s of batches that are ready for the network, of random images: from the memory map of a packed set, from shards
in a folder, and from the same shards behind a web server on this machine. The three take turns, so that other work on
the machine slows all, and the best turn of each counts. All files lie in the system's cache: what is compared is the
work of the processor.
"""

from __future__ import annotations

import argparse
import functools
import http.server
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch

from improved_diffusion.data.batches import BatchStream
from improved_diffusion.data.image_set import ImageSet
from improved_diffusion.data.packing import allocate
from improved_diffusion.data.shard_stream import ShardStream
from improved_diffusion.data.shards import open_sharded_set, write_shards
from improved_diffusion.errors import user_errors_exit

CPU = torch.device("cpu")
LANES = 8


class SilentHandler(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *_: object) -> None:
        pass


def make_packed_set(folder: Path, count: int, size: int) -> ImageSet:
    """As it lies on disk, without what makes it a whole one."""
    file = folder / "images.npy"
    allocate(file, (count, size, size, 3))
    images, rng = np.load(file, mmap_mode="r+"), np.random.default_rng(0)
    for start in range(0, count, 1000):
        images[start : start + 1000] = rng.integers(0, 256, images[start : start + 1000].shape, dtype=np.uint8)
    images = np.load(file, mmap_mode="r")
    return ImageSet(images, rng.integers(0, 10, count), tuple("0123456789"), folder, "all", "")


def rate(batches: Iterator, steps: int, batch_size: int) -> float:
    start = time.perf_counter()
    for _ in range(steps):
        next(batches)
    return steps * batch_size / (time.perf_counter() - start)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=20_000, help="in the set")
    parser.add_argument("--image-size", type=int, default=64, help="pixels")
    parser.add_argument("--batch-size", type=int, default=64, help="images per step")
    parser.add_argument("--shard-megabytes", type=int, default=8, help="of images in a shard")
    parser.add_argument("--turns", type=int, default=5, help="of each; one goes through the set once")
    parser.add_argument("--folder", type=Path, help="on whose disk to write (default: that of temporary files)")
    options = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        image_set = make_packed_set(Path(name), options.images, options.image_size)
        sharded = write_shards(image_set, Path(name) / "shards", options.shard_megabytes * 10**6)
        handler = functools.partial(SilentHandler, directory=sharded.path)
        with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
            threading.Thread(target=server.serve_forever, daemon=True).start()
            url = f"http://127.0.0.1:{server.server_port}"
            of_shards = functools.partial(
                ShardStream, batch_size=options.batch_size, seed=0, flip=True, lanes=LANES, device=CPU
            )
            streams = {
                "memory map": BatchStream(image_set, options.batch_size, 0, flip=True, device=CPU).batches(0),
                "shards, folder": of_shards(sharded).batches(0),
                "shards, HTTP": of_shards(open_sharded_set(url)).batches(0),
            }
            steps = options.images // options.batch_size
            rates: dict[str, list[float]] = {name: [] for name in streams}
            for _ in range(options.turns):
                for name, batches in streams.items():
                    rates[name].append(rate(batches, steps, options.batch_size))
            server.shutdown()
    size, best = options.image_size, {name: max(measured) for name, measured in rates.items()}
    print(f"{options.images:,} images of {size}x{size} in {len(sharded.shards)} shards, batch {options.batch_size}")
    for name, measured in best.items():
        print(f"{name:<24}{measured:>10,.0f} images/s{measured / best['memory map']:>10.2f}")


if __name__ == "__main__":
    with user_errors_exit():
        main()
