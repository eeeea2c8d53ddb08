"""Filling the rows of one array from many processes, each of which writes its rows in place."""

from __future__ import annotations

import contextlib
import ctypes
import multiprocessing
import os
import signal
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

import numpy as np
from PIL import UnidentifiedImageError

from improved_diffusion.errors import UserError
from improved_diffusion.progress import progress

MAX_BROKEN = 0.02  # fraction of a source's images; above it the source is taken to be damaged as a whole
CHUNK_ROWS = 128  # per task: long enough to hide the messages between processes, short enough for an even end

Render = Callable[[Any], np.ndarray]  # key of a row -> its content; must be picklable


@contextlib.contextmanager
def render_pool(render: Render, workers: int) -> Iterator[ProcessPoolExecutor]:
    """Processes for `fill_rows`; they end at once when the block does, or when this process is killed.

    They are spawned, because forking a process that has threads (PyTorch's, say) can deadlock. A script that calls this
    therefore needs `if __name__ == "__main__"`. Raises `UserError` when a process dies.
    """
    context = multiprocessing.get_context("spawn")
    stop = context.RawValue("b", False)
    pool = ProcessPoolExecutor(workers, mp_context=context, initializer=_start_worker, initargs=(render, stop))
    try:
        yield pool
    except BrokenProcessPool as error:
        raise UserError("a worker process died (killed, or out of memory): try again with fewer --workers") from error
    finally:
        stop.value = True  # or a worker would first finish its chunk, which takes long where images are large
        pool.shutdown(cancel_futures=True)


def fill_rows(
    pool: ProcessPoolExecutor, array_file: Path, keys: Sequence[Any], title: str, total: int
) -> dict[int, str]:
    """Write `render(keys[i])` to row i of the .npy file `array_file`, for all i.

    Returns the reason for every row that could not be rendered, in increasing order of rows. Raises `UserError` as soon
    as they are more than `MAX_BROKEN` of `total`, the number of images to which these belong.
    """
    futures: dict[Future, int] = {}
    for first in range(0, len(keys), CHUNK_ROWS):
        chunk = keys[first : first + CHUNK_ROWS]
        futures[pool.submit(_fill_chunk, array_file, first, chunk)] = len(chunk)
    broken: dict[int, str] = {}
    with progress(total=len(keys), desc=title, unit=" images") as bar:
        for future in as_completed(futures):
            broken |= future.result()
            bar.update(futures[future])
            if len(broken) > MAX_BROKEN * total:
                row = min(broken)
                raise UserError(
                    f"{title}: {len(broken)} of the first {bar.n} images are broken, more than {MAX_BROKEN:.0%} "
                    f"of all {total}, so nothing was written; check that the source is complete. "
                    f"For one, {str(keys[row])!r}: {broken[row]}"
                )
    return dict(sorted(broken.items()))


# ----------------------------------------------------------------------------------------------------------------------
# In a worker process

_render: Render
_stop: ctypes.c_byte  # shared without a lock: a worker that is killed while it holds one would block all others


def _start_worker(render: Render, stop: ctypes.c_byte) -> None:
    global _render, _stop
    _render, _stop = render, stop
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the parent alone answers it
    warnings.simplefilter("ignore")  # Pillow warns of odd metadata and large images, image after image
    threading.Thread(target=_exit_with_parent, daemon=True).start()


def _exit_with_parent() -> None:
    """A worker whose parent was killed would wait for its next chunk for ever."""
    multiprocessing.parent_process().join()
    os._exit(1)


def _fill_chunk(array_file: Path, first_row: int, keys: Sequence[Any]) -> dict[int, str]:
    array = np.load(array_file, mmap_mode="r+")
    broken = {}
    for row, key in enumerate(keys, first_row):
        if _stop.value:
            break
        try:
            array[row] = _render(key)
        except UnidentifiedImageError:  # its own message is an address in memory
            broken[row] = "not an image of a known format"
        except Exception as error:  # Pillow has no common base class for what a damaged file can raise
            broken[row] = f"{error}" or type(error).__name__
    return broken
