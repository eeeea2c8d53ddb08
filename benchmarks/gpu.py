"""What a GPU makes of this code, in at most 8 minutes: `python benchmarks/gpu.py [--out gpu-benchmark]`.

First whether it computes what the CPU does: loss, gradients, noise, samples, features; resumed, captured and compiled
training. Then how fast it is: training the replication UNet (configs/food101_hybrid.yaml) at several batch sizes,
eager, in a CUDA graph, and compiled; sampling by every sampler; features and their distance; the memory of each. It
needs nothing that is not in the repository: images are noise, and the Inception network has random weights.

It writes gpu.json and gpu.md. What no longer fits into the time is left out and named; what runs out of memory, or
fails, is a line, and the rest goes on. Where there is no GPU a small form of all runs on the CPU, so that it is tested.
"""

from __future__ import annotations

import argparse
import gc
import json
import signal
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from gpu_parts.cases import Case, Row
from gpu_parts.checks import correctness_cases
from gpu_parts.speed import MODES, measuring_cases, noise_cases, sampling_cases, small, training_cases, whole

from improved_diffusion.config_file import load_config
from improved_diffusion.results import markdown_table
from improved_diffusion.runtime.devices import choose_precision, start_processes

CONFIG = Path(__file__).parent.parent / "configs" / "food101_hybrid.yaml"
Report = dict[str, Any]


class OutOfTime(BaseException):
    """Raised by the alarm clock, through whatever would catch an Exception."""


def ring(number: int, frame: FrameType | None) -> None:
    raise OutOfTime


def run_case(case: Case, deadline: float) -> Row:
    """What it gives; or a `note` of why it gives nothing."""
    left = deadline - time.monotonic()
    if left < 1:
        return {"note": "left out: the time was over"}
    signal.setitimer(signal.ITIMER_REAL, left)
    try:
        return case.run()
    except OutOfTime:
        return {"note": "stopped: the time was over"}
    except torch.OutOfMemoryError:
        return {"note": "out of memory"}
    except Exception as error:  # whatever it is, the other lines are worth having
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        return {"passed": False, "note": f"failed: {type(error).__name__}: {reason}"}
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)


def run_part(part: str, cases: Iterable[Case], deadline: float) -> list[Row]:
    """The rows of a part; each is printed as it comes."""
    rows = []
    for case in cases:
        rows.append({"case": case.name, **run_case(case, deadline)})
        print(f"{part}: {', '.join(f'{name} {shown(value)}' for name, value in rows[-1].items())}", flush=True)
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
            torch.compiler.reset()  # else the next of many networks would count as one recompilation too many
    return rows


def shown(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def markdown(report: Report) -> str:
    """A heading, and a table for each part."""
    lines = [f"{report['device']}, PyTorch {report['torch']}, {report['arithmetic']}; {report['seconds']:.0f} s."]
    for part, rows in report["parts"].items():
        columns = list(dict.fromkeys(name for row in rows for name in row))
        cells = [[shown(row.get(name, "")) for name in columns] for row in rows]
        lines += ["", f"### {part.capitalize()}", "", *markdown_table(columns, cells)]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("gpu-benchmark"), help="folder of gpu.json and gpu.md")
    parser.add_argument("--minutes", type=float, default=8.0, help="time for all of it")
    options = parser.parse_args()
    started = time.monotonic()
    deadline = started + 60 * options.minutes
    signal.signal(signal.SIGALRM, ring)
    with start_processes() as processes:
        device = processes.device
        on_gpu = device.type == "cuda"
        size = (whole if on_gpu else small)(load_config(CONFIG))
        if not on_gpu:
            print("there is no GPU here: the small form of the benchmark, on the CPU")
        # What costs least comes first: to compile takes longer than all the rest.
        compiling = tuple(mode for mode in size.modes if MODES[mode].get("compile"))
        parts = {
            "correctness": correctness_cases(device),
            "training": training_cases(device, size, tuple(mode for mode in size.modes if mode not in compiling)),
            "sampling": sampling_cases(device, size),
            "noise": noise_cases(device, size),
            "measuring": measuring_cases(device, size),
            "compiled training": training_cases(device, size, compiling),
        }
        rows = {part: run_part(part, cases, deadline) for part, cases in parts.items()}
        report: Report = {
            "device": torch.cuda.get_device_name(device) if on_gpu else "CPU, the small form",
            "torch": torch.__version__,
            "arithmetic": choose_precision(size.config.training.precision, device)[1],
            "seconds": time.monotonic() - started,
            "parts": {part: found for part, found in rows.items() if found},
        }
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "gpu.json").write_text(json.dumps(report, indent=1) + "\n")
    (options.out / "gpu.md").write_text(markdown(report))
    print(f"\n{markdown(report)}")
    if any(row.get("passed") is False for found in rows.values() for row in found):
        sys.exit(1)


if __name__ == "__main__":
    main()
