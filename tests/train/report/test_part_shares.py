"""Shares of a run's time, in words."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from pyralis.train.part_clock import PARTS
from pyralis.train.report.metric_rows import RunEvent, StepMetrics, from_json, parts_so_far, to_json
from pyralis.train.report.part_shares import NAMES, part_shares, parts_text, waiting_note
from pyralis.train.report.summary import RunSummary, summarise


def summary(**parts: float) -> RunSummary:
    return summarise([RunEvent("end", 1, 1, 1, 1.0, seconds_by_part=parts)])


def test_every_part_has_a_name() -> None:
    assert set(NAMES) == set(PARTS)


def test_shares_by_size_without_trifles() -> None:
    shown = summary(data=1.0, compute=90.0, optimizer=8.9, logging=0.1, other=0.0)
    assert parts_text(shown) == "forward and backward 90%, optimizer 9%, waiting for data 1%"
    assert sum(share.share for share in part_shares(shown)) == pytest.approx(1.0)
    assert parts_text(summary()) == ""


def test_chinese(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LC_ALL", "zh_CN.UTF-8")
    assert parts_text(summary(data=1.0, compute=3.0)) == "前向与反向 75%，等待数据 25%"


def test_much_waiting_is_said() -> None:
    assert waiting_note(summary(data=1.0, compute=3.0)) is None  # too short a run to say
    note = waiting_note(summary(data=100.0, compute=300.0))
    assert note is not None
    assert note.startswith("25 % of the time went into waiting for batches: dataloader_num_workers")
    assert waiting_note(summary(data=20.0, compute=300.0)) is None


def test_the_newest_row_counts_and_older_files_have_none(make_step: Callable[..., StepMetrics]) -> None:
    rows = [
        make_step(1, 1.0, seconds_by_part={"data": 1.0}), RunEvent("checkpoint", 1, 1, 1, 1.0, "", {"data": 2.0}),
        make_step(2, 1.0),
    ]  # fmt: skip
    assert parts_so_far(rows) == {"data": 2.0}
    assert parts_so_far(rows[2:]) == {}
    assert from_json(to_json(rows[1])) == rows[1]
    assert "seconds_by_part" not in to_json(rows[2])
