"""Whether Triton can start kernels on a GPU of this machine: one is tried.

What starts a kernel is itself compiled, by the machine's C compiler against Python's headers. Slim container images
have neither, and the first launch of a training step would be the one to fail.
"""
# mypy: allow-untyped-defs, allow-incomplete-defs

from __future__ import annotations

import subprocess
from functools import cache

import torch

try:
    import triton
    import triton.language as tl
except ImportError:  # for this platform there is none
    triton = None

COMPILER = "a C compiler and Python's headers are needed (Debian, Ubuntu: apt install gcc python3-dev)"


@cache
def start_problem(device: torch.device) -> str | None:
    """Why no kernel of Triton's can be started on a GPU; None if one can. Tried once: not first in a graph capture."""
    try:
        _start(device)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # of Triton, its compilers or the driver: nothing can be launched, whatever it is
        return f"Triton cannot start kernels: {_told(error)}"
    return None


def _told(error: Exception) -> str:
    if isinstance(error, subprocess.CalledProcessError | FileNotFoundError) or "C compiler" in str(error):
        return COMPILER
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


def _start(device: torch.device) -> None:
    with torch.cuda.device(device):  # Triton launches on the current device
        _write_one[(1,)](torch.empty(1, dtype=torch.int32, device=device))


if triton is not None:

    @triton.jit
    def _write_one(target):
        tl.store(target, 1)
