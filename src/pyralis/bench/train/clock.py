"""What a step takes, on the CPU and in all, and the memory that it needs."""

from __future__ import annotations

import time
from dataclasses import dataclass, field

import torch
from torch import Tensor

from pyralis.bench.train.settings import LOSS_STEPS


@dataclass(frozen=True, slots=True)
class Measured:
    """The steps of one case.

    Attributes:
        seconds: from the end of a step to that of the next, the GPU's work included; those after the warm-up.
        cpu_seconds: from the last launch of a step to that of the next; waits for the GPU included, if it waits.
        losses: of the first steps.
        first_step: seconds, compilation included.
        peak_allocated, peak_reserved: bytes, from the first step on: what a CUDA graph uses is counted only while it
            is recorded. 0 on a CPU.
        kernels, busy_seconds: of one step on the GPU, copies included, if it was profiled.
    """

    seconds: tuple[float, ...]
    cpu_seconds: tuple[float, ...]
    losses: tuple[float, ...]
    first_step: float
    peak_allocated: int = 0
    peak_reserved: int = 0
    kernels: int | None = None
    busy_seconds: float | None = None


@dataclass(eq=False)
class StepClock:
    """`start()`, then `tick(loss)` at the end of each of `total` steps, then `measured()`.

    During the warm-up each tick waits for the GPU, and what the clock itself does between steps is not counted. Timed
    steps follow one another as in training: on a GPU by its own clock (CUDA events), with no wait in between, so that
    a CPU that runs ahead hides its work and one that does not is seen to be late.
    """

    device: torch.device
    warmup: int
    steps: int
    profile: bool = False
    _ends: list[tuple[float, float]] = field(default_factory=list)  # (seconds, CPU seconds) of each step
    _events: list[tuple[torch.cuda.Event, float]] = field(default_factory=list)  # at ends of steps; when, on the CPU
    _losses: list[Tensor | float] = field(default_factory=list)
    _peaks: tuple[int, int] = (0, 0)
    _profiled: tuple[int, float] | None = None
    _profiler: torch.profiler.profile | None = None
    _last: float = 0.0

    @property
    def total(self) -> int:
        return self.warmup + self.steps + self.profile

    @property
    def wants_loss(self) -> bool:
        """Whether the loss of the step under way is one of those that are compared."""
        return len(self._losses) < LOSS_STEPS

    def start(self) -> None:
        self._wait()
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
            if not self.warmup:
                self._mark()
        self._last = time.perf_counter()

    def tick(self, loss: Tensor | None = None) -> None:
        """A step has ended; `loss` is kept if `wants_loss`."""
        if loss is not None and self.wants_loss:
            self._losses.append(loss.detach().clone())
        if self.device.type == "cuda" and self.warmup <= self._done < self.warmup + self.steps:
            self._mark()
            if len(self._events) <= self.steps:
                return
            self._read_events()
        else:
            launched = time.perf_counter()
            self._wait()
            self._ends.append((time.perf_counter() - self._last, launched - self._last))
        if self.device.type == "cuda":
            self._on_gpu(self._done)
        self._last = time.perf_counter()

    def add_loss(self, loss: float) -> None:
        """Of a step whose loss is told apart from its end."""
        if self.wants_loss:
            self._losses.append(loss)

    def measured(self) -> Measured:
        timed = self._ends[self.warmup : self.warmup + self.steps]
        kernels, busy = self._profiled or (None, None)
        return Measured(
            tuple(wall for wall, _ in timed), tuple(cpu for _, cpu in timed), tuple(map(float, self._losses)),
            self._ends[0][0],
            *self._peaks, kernels, busy,
        )  # fmt: skip

    @property
    def _done(self) -> int:
        return len(self._ends) + max(len(self._events) - 1, 0)

    def _mark(self) -> None:
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self.device))
        self._events.append((event, time.perf_counter()))

    def _read_events(self) -> None:
        self._wait()
        for (before, launched_before), (event, launched) in zip(self._events, self._events[1:]):
            self._ends.append((before.elapsed_time(event) * 1e-3, launched - launched_before))
        self._events.clear()

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def _on_gpu(self, done: int) -> None:
        if done == self.warmup:
            self._mark()
        elif done == self.warmup + self.steps:
            self._peaks = torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved()
            if self.profile:
                self._profiler = torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA])
                self._profiler.start()
        elif self._profiler is not None:
            self._profiler.stop()
            events = [event for event in self._profiler.events() or () if _on_device(event)]
            self._profiled = len(events), sum(event.device_time for event in events) * 1e-6
            self._profiler = None


def _on_device(event: object) -> bool:
    """Whether it is a kernel or a copy: ranges that the CPU named are events of the device too."""
    on_device = str(getattr(event, "device_type", "")).endswith("CUDA")
    return on_device and not getattr(event, "is_user_annotation", False)
