"""Functions in C, compiled when they are first wanted, for what no sequence of PyTorch's operations does fast."""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import platform
import shlex
import subprocess
import warnings
from pathlib import Path

from improved_diffusion.cache import cache_directory
from improved_diffusion.errors import UserError
from improved_diffusion.files import atomic_write

# No flag that would let the compiler reorder sums or take NaNs for granted.
FLAGS = ("-O3", "-fno-math-errno", "-fno-trapping-math", "-fopenmp", "-shared", "-fPIC")


@functools.cache
def compiled(source: Path, *definitions: str) -> ctypes.CDLL | None:
    """The functions in a file of C, given macros (`-DNAME`); None, after one warning, where they cannot be compiled.

    The compiler is `$CC`, or else cc; what it made, in about a second, is kept in the cache, by source, flags, compiler
    and instruction set. With `IMPROVED_DIFFUSION_C=0` nothing is compiled.
    """
    if os.environ.get("IMPROVED_DIFFUSION_C") == "0":
        return None
    command = [*shlex.split(os.environ.get("CC", "cc")), *FLAGS, *_instruction_set(), *definitions]
    try:
        # The predefined macros name the compiler's version and the instruction set that `native` is here.
        target = _output([*command, "-dM", "-E", "-x", "c", os.devnull])
        key = hashlib.sha256(b"\n".join([source.read_bytes(), " ".join(command).encode(), target])).hexdigest()
        library = cache_directory() / "c" / f"{source.stem}-{key[:16]}.so"
        if not library.is_file():
            with atomic_write(library) as temporary:
                _output([*command, str(source), "-o", str(temporary), "-lm"])
        return ctypes.CDLL(str(library))
    except (OSError, subprocess.SubprocessError, UserError) as error:
        reason = (getattr(error, "stderr", None) or str(error).encode()).decode(errors="replace").strip().splitlines()
        warnings.warn(
            f"{source.name} cannot be compiled here, and PyTorch's own operations, which are slower, take its place: "
            f"{reason[0] if reason else command[0]}",
            stacklevel=2,
        )
        return None


def _instruction_set() -> tuple[str, ...]:
    """This machine's own, with the whole width of AVX512, of which compilers keep to half; AVX2 where PyTorch is held
    to that."""
    if platform.machine() != "x86_64":
        return ("-march=native",)
    if os.environ.get("ATEN_CPU_CAPABILITY") == "avx2":
        return ("-march=x86-64-v3",)
    return ("-march=native", "-mprefer-vector-width=512")


def _output(command: list[str]) -> bytes:
    return subprocess.run(command, check=True, capture_output=True, timeout=120).stdout
