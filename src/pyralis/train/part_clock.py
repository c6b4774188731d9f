"""What the time of a run goes into: one part at a time, by marks at the calls that a trainer makes anyway.

On a CPU a mark is the time at which it is set. On a GPU it is an event in the stream, since the CPU runs ahead: the
time between two events is what the GPU spent on what was launched between them, and on waiting for it. "data" is then
how long the GPU stood still for batches, not how long the CPU took to make them. Events are read when they have
happened, so nothing waits for them.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Literal, Protocol, TypeAlias, get_args

import torch

Part: TypeAlias = Literal["data", "compute", "optimizer", "logging", "evaluation", "saving", "other"]
PARTS: tuple[Part, ...] = get_args(Part)


class Mark(Protocol):
    def happened(self) -> bool: ...

    def wait(self) -> None: ...

    def seconds_since(self, earlier: Mark) -> float: ...


class HostMark:
    def __init__(self) -> None:
        self.time = time.perf_counter()

    def happened(self) -> bool:
        return True

    def wait(self) -> None:
        pass

    def seconds_since(self, earlier: Mark) -> float:
        assert isinstance(earlier, HostMark)
        return self.time - earlier.time


class DeviceMark:
    """An event in the current stream."""

    def __init__(self) -> None:
        self.event = torch.cuda.Event(enable_timing=True)
        self.event.record()

    def happened(self) -> bool:
        return bool(self.event.query())

    def wait(self) -> None:
        self.event.synchronize()

    def seconds_since(self, earlier: Mark) -> float:
        assert isinstance(earlier, DeviceMark)
        return float(earlier.event.elapsed_time(self.event)) / 1e3


class PartClock:
    """Seconds by part, from `start` to `stop`. mark: HostMark or DeviceMark."""

    def __init__(self, mark: Callable[[], Mark] = HostMark) -> None:
        self._mark = mark
        self._totals: dict[str, float] = dict.fromkeys(PARTS, 0.0)
        self._marks: deque[tuple[Part, Mark]] = deque()  # when each part began

    @property
    def running(self) -> bool:
        return bool(self._marks)

    def start(self) -> None:
        """Begin with "other". What was measured before is kept."""
        self.stop()
        self._marks.append(("other", self._mark()))

    def stop(self) -> None:
        """Wait for the last mark, once a run."""
        if self._marks:
            self._marks.append(("other", self._mark()))
            self._marks[-1][1].wait()
            self._settle()
            self._marks.clear()

    def enter(self, part: Part) -> Part:
        """The time from now on is this part's. Returns the one before."""
        if not self._marks:
            return "other"
        before = self._marks[-1][0]
        if part != before:
            self._marks.append((part, self._mark()))
            self._settle()
        return before

    @contextmanager
    def within(self, part: Part) -> Iterator[None]:
        before = self.enter(part)
        try:
            yield
        finally:
            self.enter(before)

    def seconds(self) -> dict[str, float]:
        """By part, as far as it has happened on the device."""
        if self._marks:
            part = self._marks[-1][0]
            self._marks.append((part, self._mark()))
            self._settle()
        return dict(self._totals)

    def _settle(self) -> None:
        while len(self._marks) > 1 and self._marks[1][1].happened():
            part, begin = self._marks.popleft()
            self._totals[part] += self._marks[0][1].seconds_since(begin)
