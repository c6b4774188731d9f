"""What all tests share: one CPU thread a process (two run side by side), no telemetry, no GPU tests without a GPU."""

from __future__ import annotations

import os
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("MKL_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
os.environ.setdefault("DO_NOT_TRACK", "1")
os.environ["LC_ALL"] = "C.UTF-8"  # terminals are spoken to in English

import pytest
import torch

if not torch.cuda.is_available():  # read when Triton is imported: kernels then run on CPU tensors, see tests/ops
    os.environ.setdefault("TRITON_INTERPRET", "1")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    gpu_items = [item for item in items if item.get_closest_marker("gpu")]
    if not gpu_items:
        return
    if not torch.cuda.is_available():
        for item in gpu_items:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA GPU"))


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """Folder of SmolLM2-135M-Instruct; fetched once a machine (93 MB), then from the cache."""
    from pyralis.models.fetch import fetch_model

    return fetch_model("smollm2-135m-instruct")
