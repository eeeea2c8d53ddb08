"""What the worker's device saves: `python benchmarks/serving_device.py [--images 16]`.

Jobs of the small model in pretrained/synthetic-64 drawn four at once against one by one (a picture alone is drawn in a
batch of two, see `sampling.generate`), and a style whose adapters are kept against one whose adapters are read, on a
tiny random SDXL.
The two sides of each comparison take turns.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

PROJECT = Path(__file__).parent.parent
sys.path.insert(0, str(PROJECT / "scripts"))

from improved_diffusion.personalize.quiet import quieten_libraries  # noqa: E402

quieten_libraries()

import torch  # noqa: E402
from tiny_pipeline import make_pipeline  # noqa: E402

from improved_diffusion.errors import user_errors_exit  # noqa: E402
from improved_diffusion.personalize.config import PersonalizeConfig  # noqa: E402
from improved_diffusion.personalize.models.base import load_base  # noqa: E402
from improved_diffusion.personalize.models.trained import prepare  # noqa: E402
from improved_diffusion.run_directory import RunDirectory  # noqa: E402
from improved_diffusion.sampling.loading import load  # noqa: E402
from improved_diffusion.serving.drawers import PixelDrawer  # noqa: E402
from improved_diffusion.serving.requests import ClassRequest  # noqa: E402
from improved_diffusion.serving.text_drawer import AdapterCache  # noqa: E402

AT_ONCE, TURNS = 4, 5


def compare_batches(images: int) -> None:
    """Print the rates of jobs one by one and four at once, and their ratio."""
    model = load(PROJECT / "pretrained" / "synthetic-64")
    drawer = PixelDrawer(model, AT_ONCE)
    jobs = [ClassRequest(class_name=model.row_names[0], seed=seed) for seed in range(images)]

    def draw(size: int) -> None:
        for first in range(0, images, size):
            drawer.draw(jobs[first : first + size], lambda progress: None)

    one, four = take_turns(lambda: draw(1), lambda: draw(AT_ONCE), 2)
    print(f"one by one      {images / one:8.2f} jobs/s")
    print(f"four at once    {images / four:8.2f} jobs/s")
    print(f"ratio           {one / four:8.2f}")


def compare_adapters(folder: Path) -> None:
    """Print the milliseconds until a style can draw, read and kept, and their ratio."""
    make_pipeline("sdxl").save_pretrained(folder / "base")
    config = PersonalizeConfig(base=str(folder / "base"))
    runs = {name: RunDirectory(folder / name) for name in ("one", "other")}
    trained = prepare(load_base(config.base), config)
    for run in runs.values():
        run.write_config(config, [{}])
        run.save_checkpoint({"step": 1, "model": trained.state_dict(), "ema": {}}, keep=1)
    base = load_base(config.base)
    cache = AdapterCache(base, runs, 10**9)

    def read() -> None:
        cache.clear()
        cache.use("one")
        cache.use("other")

    def kept() -> None:
        cache.use("one")
        cache.use("other")

    loaded, cached = take_turns(read, kept, TURNS)
    print(f"a style, read   {500 * loaded:8.1f} ms")
    print(f"a style, kept   {500 * cached:8.1f} ms")
    print(f"ratio           {loaded / cached:8.1f}")


def take_turns(first: Callable[[], None], second: Callable[[], None], turns: int) -> tuple[float, float]:
    """The least seconds of each."""
    seconds: list[list[float]] = [[], []]
    for _ in range(turns):
        for way, times in zip((first, second), seconds, strict=True):
            began = time.perf_counter()
            way()
            times.append(time.perf_counter() - began)
    return min(seconds[0]), min(seconds[1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=16, help="jobs of one picture each")
    options = parser.parse_args()
    torch.set_grad_enabled(False)
    compare_batches(options.images)
    print()
    with tempfile.TemporaryDirectory() as folder:
        compare_adapters(Path(folder))


if __name__ == "__main__":
    with user_errors_exit():
        main()
