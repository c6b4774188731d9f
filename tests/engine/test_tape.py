"""The recorder for CPU tests: it shows each fault that a CUDA graph would have."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tests.engine.tape import Fault, TapeRecorder


def test_a_recording_changes_nothing_and_a_replay_reads_memory() -> None:
    x, total, factor = torch.arange(3.0), torch.zeros(3), [2.0]
    made: list[Tensor] = []

    def work() -> None:
        made[:] = [x * factor[0]]
        total.add_(made[0])

    replay = TapeRecorder().record(work)
    assert torch.equal(total, torch.zeros(3))
    assert made[0].isnan().all(), "what was only recorded holds nothing"
    x += 1
    factor[0] = 5.0  # Python's numbers stay as they were
    replay()
    assert torch.equal(total, 2 * x)
    assert torch.equal(made[0], 2 * x)


def test_memory_that_has_gone_is_noticed() -> None:
    held = [torch.ones(3)]
    out = torch.zeros(3)
    replay = TapeRecorder().record(lambda: out.copy_(held[0]))
    replay()
    held.clear()
    with pytest.raises(Fault, match="given back"):
        replay()


def test_memory_read_before_it_is_written() -> None:
    out = torch.zeros(4)

    def work() -> None:
        buffer = torch.empty(4)
        buffer[:2] = 1
        out.copy_(buffer)

    TapeRecorder().record(work)()
    assert torch.equal(out.isnan(), torch.tensor([False, False, True, True]))


def test_what_is_kept_of_a_recording_lasts_until_another_is_replayed() -> None:
    recorder, x, kept = TapeRecorder(), torch.ones(3), {}

    def first() -> None:
        kept["sum"] = x + 1

    def second() -> None:
        kept["product"] = kept["sum"] * 3

    forward, backward = recorder.record(first), recorder.record(second)
    forward()
    backward()
    assert torch.equal(kept["product"], torch.full((3,), 6.0))
    del kept["sum"]  # of now on its memory may be anybody's of the pool
    other = recorder.record(lambda: kept.update(other=x + 5))
    forward()
    other()
    backward()
    assert kept["product"].isnan().all()


def test_a_number_read_is_an_error() -> None:
    x = torch.ones(3)
    with pytest.raises(RuntimeError, match="capturing"):
        TapeRecorder().record(lambda: x.mul_(x.sum().item()))
