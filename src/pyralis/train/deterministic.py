"""`deterministic: true`: the same bits from the same config, seed, machine and software, also on a GPU.

Trainer's `full_determinism` does more and less: it also makes every kernel launch wait for the one before
(`CUDA_LAUNCH_BLOCKING`), which changes no result, and it is never undone.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

# cuBLAS picks among workspaces when streams run side by side, and with them the order of its sums, unless told one:
# https://docs.nvidia.com/cuda/cublas/#results-reproducibility. FlashAttention's and transformers' own switch follows.
ENVIRONMENT = {"CUBLAS_WORKSPACE_CONFIG": ":4096:8", "FLASH_ATTENTION_DETERMINISTIC": "1"}


@contextmanager
def deterministic(on: bool = True) -> Iterator[None]:
    """While it lasts, torch takes deterministic algorithms only and raises RuntimeError where it has none; attention
    takes a backward that is deterministic (`ops/attention.py`); cuDNN times nothing. All is put back afterwards.

    To be entered before the process's first matrix product on a GPU: cuBLAS reads its setting then, and only once.
    """
    if not on:
        yield
        return
    cudnn: Any = torch.backends.cudnn
    filling: Any = torch.utils.deterministic
    algorithms = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    switches = cudnn.deterministic, cudnn.benchmark, filling.fill_uninitialized_memory
    environment = {name: os.environ.get(name) for name in ENVIRONMENT}
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    torch.use_deterministic_algorithms(True)
    cudnn.deterministic, cudnn.benchmark = True, False
    filling.fill_uninitialized_memory = False  # finds reads of what was never written; costs a write of every buffer
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(algorithms[0], warn_only=algorithms[1])
        cudnn.deterministic, cudnn.benchmark, filling.fill_uninitialized_memory = switches
        for name, before in environment.items():
            if before is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = before
