"""Where a result comes from: the command line, the code, the data, the versions, the machine."""

from __future__ import annotations

import platform
import shlex
import subprocess
import sys
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from improved_diffusion import __version__


def provenance_entry(
    data: dict[str, Any], device: torch.device, processes: int, packages: tuple[str, ...]
) -> dict[str, Any]:
    """What is to be recorded of one start or resume of a run; `data` names what it works on, with its hash."""
    return {
        "command_line": shlex.join(sys.argv),
        "started": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "git_commit": git_commit(),
        "data": data,
        "device": device_name(device),
        "processes": processes,
        "versions": {"improved_diffusion": __version__, **{name: version(name) for name in packages}},
        "python": platform.python_version(),
    }


def device_name(device: torch.device) -> str:
    """Of a GPU, or of the CPU with the number of threads that PyTorch uses of it."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    info = Path("/proc/cpuinfo")
    lines = info.read_text(errors="replace").splitlines() if info.is_file() else []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    threads = torch.get_num_threads()
    return f"{models[0] if models else platform.machine() + ' CPU'}, {threads} thread{'s' * (threads > 1)}"


def project_version() -> dict[str, str | None]:
    """The version of this project, and its commit, with `-dirty` where files differ from it; None where unknown."""
    return {"version": __version__, "commit": git_commit()}


def git_commit() -> str | None:
    """The commit of this project, if it lies in a repository."""
    here = Path(__file__).parent
    try:
        done = subprocess.run(["git", "describe", "--always", "--dirty"], cwd=here, capture_output=True, text=True)
    except OSError:
        return None
    return done.stdout.strip() or None
