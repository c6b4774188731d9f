"""The clock of a step."""

from __future__ import annotations

import time

import pytest
import torch

from pyralis.bench.train.clock import StepClock


def test_only_what_comes_after_the_warm_up_is_timed() -> None:
    clock = StepClock(torch.device("cpu"), warmup=2, steps=2)
    assert clock.total == 4
    clock.start()
    for step in range(clock.total):
        time.sleep(0.05 if step == 0 else 0.002)
        clock.tick(torch.tensor(float(step)))
    measured = clock.measured()
    assert measured.first_step >= 0.05
    assert len(measured.seconds) == 2
    assert all(0.002 <= seconds < 0.05 for seconds in measured.seconds)
    assert all(cpu <= wall for cpu, wall in zip(measured.cpu_seconds, measured.seconds))
    assert measured.losses == (0.0, 1.0, 2.0)
    assert (measured.peak_allocated, measured.kernels) == (0, None)


def test_losses_may_be_told_apart() -> None:
    clock = StepClock(torch.device("cpu"), warmup=1, steps=4)
    clock.start()
    for step in range(5):
        clock.tick()
        clock.add_loss(float(step))
    assert clock.measured().losses == (0.0, 1.0, 2.0)
    assert not clock.wants_loss


@pytest.mark.gpu
def test_on_a_gpu() -> None:
    device = torch.device("cuda")
    clock = StepClock(device, warmup=1, steps=2, profile=True)
    x = torch.randn(2048, 2048, device=device)
    clock.start()
    for _ in range(clock.total):
        y = x @ x
        clock.tick((y + 1).sum())
    measured = clock.measured()
    assert measured.kernels is not None
    assert measured.busy_seconds is not None
    assert measured.kernels >= 3
    assert 0 < measured.busy_seconds < 1
    assert measured.peak_reserved >= measured.peak_allocated >= 3 * x.nbytes
    assert len(measured.seconds) == len(measured.cpu_seconds) == 2
    assert all(cpu > 0 for cpu in measured.cpu_seconds)
    assert 0 < sum(measured.seconds) < 1
    assert len(measured.losses) == 3


class Events:
    """CUDA events of a GPU on which the n-th step ends at n * 0.25 s."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.recorded, self.waits, outer = 0, 0, self

        class Event:
            at = 0

            def __init__(self, enable_timing: bool) -> None:
                assert enable_timing

            def record(self, _stream: object) -> None:
                self.at, outer.recorded = outer.recorded, outer.recorded + 1

            def elapsed_time(self, other: Event) -> float:
                return (other.at - self.at) * 250.0

        def wait() -> None:
            self.waits += 1

        cuda = torch.cuda
        monkeypatch.setattr(cuda, "Event", Event)
        monkeypatch.setattr(cuda, "synchronize", wait)
        for name in ("current_stream", "reset_peak_memory_stats"):
            monkeypatch.setattr(cuda, name, lambda *_: None)
        for name in ("max_memory_allocated", "max_memory_reserved"):
            monkeypatch.setattr(cuda, name, lambda: 7)


@pytest.mark.parametrize("warmup", [0, 2])
def test_timed_steps_on_a_gpu_do_not_wait(monkeypatch: pytest.MonkeyPatch, warmup: int) -> None:
    events = Events(monkeypatch)
    clock = StepClock(torch.device("cuda"), warmup=warmup, steps=4)
    clock.start()
    for step in range(clock.total):
        clock.tick(torch.tensor(float(step)))
        assert events.waits == 1 + min(step + 1, warmup) + (step + 1 == clock.total)
    measured = clock.measured()
    assert measured.seconds == (0.25,) * 4
    assert measured.losses == (0.0, 1.0, 2.0)
    assert measured.peak_allocated == 7
