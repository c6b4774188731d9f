"""What a failed CUDA graph capture leaves behind."""

from __future__ import annotations

import torch


def mend_capture(stream: torch.cuda.Stream | None = None) -> None:
    """A capture that failed leaves torch's generator in capture, and every later torch.randn would raise; one that
    succeeds puts it right."""
    torch.cuda.synchronize()
    with torch.cuda.graph(torch.cuda.CUDAGraph(), stream=stream, capture_error_mode="thread_local"):
        torch.zeros(1, device="cuda")
