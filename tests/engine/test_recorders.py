"""The recorder of CUDA graphs around captures that are made up: streams, modes, and what a failure means."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch

from pyralis.engine import recorders
from pyralis.engine.recorders import CudaGraphs, first_line
from pyralis.engine.shortage import is_shortage
from pyralis.ops._shortage import ran_short


class Gpu:
    """As torch.cuda, whose captures may end with an error, and leave their stream the current one then."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.stream: Any = "usual"
        self.ends_with: Exception | None = None
        self.settings: dict[str, Any] = {}
        self.done: list[str] = []
        outer = self

        class Stream:
            device = torch.device("cpu")

            def wait_stream(self, other: str) -> None:
                outer.done.append(f"the capture's stream waits for the {other} one")

        class Graph:
            def replay(self) -> None:
                outer.done.append("replay")

        @contextmanager
        def graph(made: Any, *, stream: Any, **settings: Any) -> Iterator[None]:
            before, self.stream, self.settings = self.stream, stream, settings
            yield
            if self.ends_with is not None:
                raise self.ends_with
            self.stream = before

        parts = {
            "Stream": lambda device: Stream(), "CUDAGraph": Graph, "graph": graph, "graph_pool_handle": lambda: (0, 1),
            "current_stream": lambda device: self.stream, "set_stream": lambda stream: setattr(self, "stream", stream),
        }  # fmt: skip
        for name, part in parts.items():
            monkeypatch.setattr(torch.cuda, name, part)


def test_a_capture_that_ends_with_an_error_leaves_the_stream(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = Gpu(monkeypatch)
    recorder = CudaGraphs(torch.device("cuda"))
    seen = []
    recorder.record(lambda: seen.append(gpu.stream))
    assert seen != ["usual"]
    assert gpu.stream == "usual"
    assert gpu.settings["capture_error_mode"] == "thread_local"  # loaders pin memory in threads of their own
    gpu.ends_with = RuntimeError("operation failed due to a previous error during capture")
    with pytest.raises(RuntimeError, match="previous error"):
        recorder.record(lambda: None)
    assert gpu.stream == "usual"


def test_memory_of_the_capture_waits_for_a_replay(monkeypatch: pytest.MonkeyPatch) -> None:
    """Which runs on another stream than the one that the memory was taken on."""
    gpu = Gpu(monkeypatch)
    replay = CudaGraphs(torch.device("cuda")).record(lambda: None)
    assert not gpu.done
    replay()
    assert gpu.done == ["replay", "the capture's stream waits for the usual one"]


def test_renewing_on_a_lost_device_raises_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever is raised already is worth more."""
    Gpu(monkeypatch)
    recorder = CudaGraphs(torch.device("cuda"))

    def lost() -> None:
        raise RuntimeError("CUDA error: device-side assert triggered")

    monkeypatch.setattr(torch.cuda, "empty_cache", lost)
    recorder.renew()


def test_the_first_error_counts() -> None:
    """What ends a capture that memory broke says nothing of memory."""
    error = RuntimeError("previous error during capture")
    error.__context__ = torch.OutOfMemoryError("CUDA out of memory.\nmore")
    assert is_shortage(error)
    assert first_line(error) == "CUDA out of memory."
    assert is_shortage(RuntimeError("CUDA error: out of memory"))
    assert not is_shortage(RuntimeError("CUDA error: invalid argument"))
    assert first_line(KeyError()) == "KeyError"
    assert recorders.recorder_for(torch.device("cpu")) is None


def test_what_more_room_may_help() -> None:
    for text in ("CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`", "CUDNN_STATUS_ALLOC_FAILED"):
        assert ran_short(RuntimeError(f"CUDA error: {text}"))
    assert ran_short(torch.OutOfMemoryError("CUDA out of memory."))
    assert not ran_short(RuntimeError("CUDA error: out of memory")), "of pinned memory, too"
    assert not ran_short(RuntimeError("CUDA error: invalid argument"))
