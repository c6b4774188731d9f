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
        (y + 1).sum()
        clock.tick()
    measured = clock.measured()
    assert measured.kernels is not None
    assert measured.busy_seconds is not None
    assert measured.kernels >= 3
    assert 0 < measured.busy_seconds < 1
    assert measured.peak_reserved >= measured.peak_allocated >= 3 * x.nbytes
    assert all(0 < cpu <= wall for cpu, wall in zip(measured.cpu_seconds, measured.seconds))
