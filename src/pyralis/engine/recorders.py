"""What makes work repeatable: CUDA graphs; where nothing can be captured, the work itself."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch

from pyralis.ops._capture import mend_capture

Work = Callable[[], None]


class Recorder(Protocol):
    """Makes work repeatable."""

    def record(self, work: Work) -> Work:
        """What does the same again on the same memory. Nothing says that the work itself is done, or is not."""

    def renew(self) -> None:
        """All that was recorded is gone."""

    def mend(self) -> None:
        """A recording has failed."""


class Rerun:
    """Where nothing can be captured (a CPU): the work itself. For tests of everything around the capture."""

    def record(self, work: Work) -> Work:
        return work

    def renew(self) -> None:
        """Nothing is kept."""

    def mend(self) -> None:
        """Nothing is left in between."""


class CudaGraphs:
    """CUDA graphs in one memory pool. What is replayed must alternate as it was captured: a forward, its backward."""

    def __init__(self, device: torch.device) -> None:
        self._pool = torch.cuda.graph_pool_handle()
        self._stream = torch.cuda.Stream(device)

    def record(self, work: Work) -> Work:
        graph = torch.cuda.CUDAGraph()
        # Other threads (a data loader that pins memory) may go on meanwhile.
        with torch.cuda.graph(graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"):
            work()
        return graph.replay

    def renew(self) -> None:
        self._pool = torch.cuda.graph_pool_handle()  # a pool dies with its last graph
        torch.cuda.empty_cache()

    def mend(self) -> None:
        mend_capture()


def recorder_for(device: torch.device) -> Recorder | None:
    """None where nothing can be captured."""
    return CudaGraphs(device) if device.type == "cuda" and torch.version.hip is None else None


def is_shortage(error: BaseException) -> bool:
    """Whether a recording failed for want of memory. Ending the capture that it broke may have raised another error."""
    found: BaseException | None = error
    while found is not None and not isinstance(found, torch.OutOfMemoryError):
        found = found.__cause__ or found.__context__
    return found is not None


def first_line(error: BaseException) -> str:
    """Of the first error: what follows from it tells less."""
    while (before := error.__cause__ or error.__context__) is not None:
        error = before
    return next(iter(str(error).splitlines()), type(error).__name__)
