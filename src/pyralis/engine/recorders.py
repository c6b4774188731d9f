"""What makes work repeatable: CUDA graphs; where nothing can be captured, the work itself."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Protocol

import torch

from pyralis.engine.shortage import is_shortage
from pyralis.errors import DeviceError
from pyralis.ops._capture import mend_capture

Work = Callable[[], None]


class Recorder(Protocol):
    """Makes work repeatable."""

    def record(self, work: Work) -> Work:
        """What does the same again on the same memory. Nothing says that the work itself is done, or is not."""

    def wait(self) -> None:
        """Come back when all replays are done: their memory may go then."""

    def renew(self) -> None:
        """All that was recorded is gone."""

    def mend(self) -> None:
        """A recording or a replay has failed. Raises RuntimeError where the device does nothing any more."""


class Rerun:
    """Where nothing can be captured (a CPU): the work itself. For tests of everything around the capture."""

    def record(self, work: Work) -> Work:
        return work

    def wait(self) -> None:
        """Nothing runs on its own."""

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
        graph, stream = torch.cuda.CUDAGraph(), torch.cuda.current_stream(self._stream.device)
        try:
            # Other threads (a data loader that pins memory, NCCL's watchdog) may go on meanwhile.
            with torch.cuda.graph(graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"):
                work()
        finally:
            torch.cuda.set_stream(stream)  # torch stays on the other one where the capture's end raises

        def replay() -> None:
            graph.replay()
            # Expandable segments are unmapped once the stream that they were taken on is done, which is not the one
            # that replays: without this, memory went under a replay that was still running.
            self._stream.wait_stream(torch.cuda.current_stream(self._stream.device))

        return replay

    def wait(self) -> None:
        with suppress(RuntimeError):  # of a device that is lost: so says whatever asks it next
            torch.cuda.synchronize(self._stream.device)

    def renew(self) -> None:
        self._pool = torch.cuda.graph_pool_handle()  # a pool dies with its last graph
        with suppress(RuntimeError):  # of a device that is lost: so says whatever asks it next
            torch.cuda.empty_cache()

    def mend(self) -> None:
        torch.cuda.synchronize(self._stream.device)
        torch.cuda.empty_cache()
        mend_capture()


def recorder_for(device: torch.device) -> Recorder | None:
    """None where nothing can be captured."""
    return CudaGraphs(device) if device.type == "cuda" and torch.version.hip is None else None


def mended(recorder: Recorder, error: Exception) -> None:
    """`recorder.mend()` after `error`. Raises DeviceError where the device does nothing any more."""
    try:
        recorder.mend()
    except RuntimeError as lost:
        if is_shortage(lost):
            return
        raise DeviceError(
            f"The GPU stopped at a recorded training step ({first_line(error)}) and does nothing more in this process "
            f"({first_line(lost)}). Start again with `cuda_graph: off`, which launches each kernel by itself; with "
            "CUDA_LAUNCH_BLOCKING=1 beside it the one that fails is named."
        ) from error


@contextmanager
def no_collection() -> Iterator[None]:
    """Python's collector waits: what it finds may belong to a device, and letting go of that can break a capture."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


def first_line(error: BaseException) -> str:
    """Of the first error: what follows from it tells less."""
    while (before := error.__cause__ or error.__context__) is not None:
        error = before
    return next(iter(str(error).splitlines()), type(error).__name__)
