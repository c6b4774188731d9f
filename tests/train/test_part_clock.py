"""What the time of a run goes into: marks read late, parts that add up, and a whole run."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from pyralis.train.part_clock import HostMark, Mark, PartClock
from pyralis.train.report.metric_rows import RunEvent, StepMetrics, read_metrics
from tests.train.runs import run


class Stream:
    """A device that runs behind: marks are set at once, and happen when it gets there."""

    def __init__(self) -> None:
        self.time = 0.0
        self.reached = 0.0

    def mark(self) -> Mark:
        stream, own = self, self.time

        class Here:
            time = own

            def happened(self) -> bool:
                return stream.reached >= own

            def wait(self) -> None:
                stream.reached = max(stream.reached, own)

            def seconds_since(self, earlier: Any) -> float:
                assert self.happened()
                return float(own - earlier.time)

        return Here()


def test_time_belongs_to_one_part_at_a_time() -> None:
    stream = Stream()
    clock = PartClock(stream.mark)
    stream.reached = 100.0
    clock.start()
    for part, seconds in (("data", 1.0), ("compute", 5.0), ("optimizer", 0.5)):
        clock.enter(part)  # type: ignore[arg-type]
        stream.time += seconds
    with clock.within("logging"):
        stream.time += 0.25
        with clock.within("saving"):
            stream.time += 2.0
        stream.time += 0.25
    clock.enter("other")
    stream.time += 0.125
    clock.stop()
    assert clock.seconds() == {
        "data": 1.0, "compute": 5.0, "optimizer": 0.5, "logging": 0.5, "evaluation": 0.0, "saving": 2.0, "other": 0.125,
    }  # fmt: skip


def test_marks_of_a_device_are_read_when_they_have_happened() -> None:
    stream = Stream()
    clock = PartClock(stream.mark)
    clock.start()
    for _ in range(3):
        clock.enter("data")
        stream.time += 1.0
        clock.enter("compute")
        stream.time += 2.0
    assert sum(clock.seconds().values()) == 0.0
    stream.reached = 4.5
    assert (clock.seconds()["data"], clock.seconds()["compute"]) == (2.0, 2.0)
    clock.stop()  # waits
    assert (clock.seconds()["data"], clock.seconds()["compute"]) == (3.0, 6.0)
    clock.start()
    stream.time += 1.0
    clock.stop()
    assert clock.seconds()["compute"] == 6.0


def test_a_clock_that_does_not_run_measures_nothing() -> None:
    clock = PartClock(HostMark)
    with clock.within("compute"):
        clock.enter("data")
    assert not any(clock.seconds().values())
    assert not clock.running


def test_a_part_ends_when_it_fails() -> None:
    clock = PartClock(HostMark)
    clock.start()
    with pytest.raises(ValueError, match="no"), clock.within("saving"):
        raise ValueError("no")
    assert clock.enter("data") == "other"


def test_a_run_knows_its_parts_and_goes_on_counting(tiny_llama: Path, chats: Path, tmp_path: Path) -> None:
    settings: dict[str, Any] = {
        "save_steps": 2, "eval_split": 0.2, "eval_strategy": "steps", "eval_steps": 2, "gradient_accumulation_steps": 2,
    }  # fmt: skip
    first = run(tiny_llama, chats, tmp_path / "out", max_steps=2, **settings)
    parts = first.summary.seconds_by_part
    assert all(parts[part] > 0 for part in ("compute", "optimizer", "evaluation", "saving"))
    (tmp_path / "out" / "pyralis_run.json").unlink()  # it goes on as a run that was killed does
    before = [m for m in read_metrics(tmp_path / "out" / "metrics.jsonl") if m.step <= 2]
    second = run(tiny_llama, chats, tmp_path / "out", max_steps=4, resume_from_checkpoint=True, **settings)
    rows = read_metrics(tmp_path / "out" / "metrics.jsonl")
    timed = [m for m in rows if isinstance(m, StepMetrics | RunEvent)]
    for a, b in pairwise(timed):
        assert a.seconds_by_part is not None
        assert b.seconds_by_part is not None
        assert all(b.seconds_by_part[part] >= seconds for part, seconds in a.seconds_by_part.items())
    assert len(before) < len(rows)
    end = timed[-1]
    assert end.seconds_by_part is not None
    assert sum(end.seconds_by_part.values()) == pytest.approx(end.elapsed_seconds, rel=0.05, abs=0.2)
    assert second.summary.seconds_by_part == end.seconds_by_part
