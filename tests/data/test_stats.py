"""Steps, padding and what packing would save, and how a terminal shows them."""

from __future__ import annotations

import io
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from pyralis.data.progress import about_rows, tokenising
from pyralis.data.stats import Batching, batch_stats, padded_positions
from pyralis.data.stats_table import LengthHistogram
from pyralis.data.tally import Tally


@pytest.mark.parametrize(
    ("rows", "batching", "steps"),
    [
        (100, Batching(4, 2, 3.0), (39, 3.0)),  # 25 micro-batches, 13 steps an epoch
        (101, Batching(4, 1, 1.0, drop_last=True), (25, 1.0)),
        (101, Batching(4, 1, 0.5), (13, 0.5)),
        (100, Batching(4, 1, 1.0, processes=5), (5, 1.0)),
        (100, Batching(4, 1, 1.0, max_steps=10), (10, 0.4)),
        (3, Batching(8, 4, 1.0), (1, 1.0)),
    ],
)
def test_steps(rows: int, batching: Batching, steps: tuple[int, float]) -> None:
    assert batching.steps(rows) == steps


def test_batching_of_arguments() -> None:
    arguments = SimpleNamespace(
        per_device_train_batch_size=2, gradient_accumulation_steps=3, num_train_epochs=1.5, max_steps=-1,
        dataloader_drop_last=True,
    )  # fmt: skip
    assert Batching.of(arguments, 4) == Batching(2, 3, 1.5, -1, True, 4)


@given(st.lists(st.integers(1, 50), min_size=1, max_size=40), st.integers(1, 9))
def test_padded_positions(lengths: list[int], batch: int) -> None:
    batches = [lengths[at : at + batch] for at in range(0, len(lengths), batch)]
    assert padded_positions(np.asarray(lengths), batch) == sum(max(one) * len(one) for one in batches)


def test_batch_stats() -> None:
    lengths = np.asarray([10, 30] * 50)
    stats = batch_stats(lengths, Batching(2, 1, 1.0), room=40)
    assert stats.steps == 50
    assert stats.grouped_padding == 0
    assert 0.1 < stats.padding < 0.3  # half of the pairs are of two lengths: 1 - 20 / 25
    assert stats.packed is not None
    assert (stats.packed.rows, stats.packed.steps, stats.packed.fill) == (50, 25, 1.0)
    text = "\n".join(stats.lines())
    assert "50 steps in 1 epochs" in text
    assert "with packing: true: 50 rows, 100.0% full, in 25 steps" in text
    assert batch_stats(lengths, Batching(2, 1, 1.0)).packed is None


def test_one_length_needs_no_grouping() -> None:
    stats = batch_stats(np.full(10, 7), Batching(3, 1, 1.0))
    assert (stats.padding, stats.grouped_padding) == (0, 0)
    assert "group_by_length" not in "\n".join(stats.lines())


@pytest.mark.parametrize(("longest", "width"), [(5, 1), (19, 1), (20, 2), (39, 2), (40, 5), (1024, 100), (99, 5)])
def test_bins_are_of_a_round_width(longest: int, width: int) -> None:
    lengths = [1, longest, longest]
    report = Tally().report(lengths, sequences=3, tokens=1, supervised_tokens=1, packed_fill=None)
    uppers = [upper for upper, _ in report.length_histogram]
    assert uppers == list(range(width, longest + width + 1, width))[: len(uppers)]
    assert len(uppers) <= 20
    assert uppers[-1] - width <= longest < uppers[-1]
    assert sum(count for _, count in report.length_histogram) == 3


@pytest.mark.parametrize("width", [30, 80, 140])
def test_histogram_fits_the_terminal(width: int) -> None:
    bins = ((1000, 0), (2000, 3), (3000, 0), (4000, 1_200_000), (5000, 0))
    console = Console(file=io.StringIO(), width=width)
    console.print(LengthHistogram(bins))
    lines = console.file.getvalue().splitlines()  # type: ignore[attr-defined]
    assert [line.split("  ")[0].strip() for line in lines] == ["1,000 to 1,999", "2,000 to 2,999", "3,000 to 3,999"]
    assert all(len(line) <= width for line in lines)
    assert lines[0].rstrip()[-1] == "▏"  # of few rows there is something to see
    assert lines[1].rstrip().endswith(" 0")
    assert lines[2].count("█") == min(width - 14 - 9 - 4, 60)


def test_progress_on_a_terminal_and_elsewhere(tmp_path: Path) -> None:
    for terminal in (True, False):
        console = Console(file=io.StringIO(), force_terminal=terminal, width=80)
        with tokenising(console) as told:
            told(0, 2000)
            told(1500, 2000)
            told(2500, 2000)  # more than estimated
            told(10, None)
        output = console.file.getvalue()  # type: ignore[attr-defined]
        assert ("tokenising" in output) == terminal


def test_rows_are_estimated(tmp_path: Path) -> None:
    small, large, other = tmp_path / "a.jsonl", tmp_path / "b.jsonl", tmp_path / "c.csv"
    small.write_text('{"text": "a"}\n{"text": "b"}')
    assert about_rows(small) == 2
    large.write_text("".join(f'{{"text": "{i:030}"}}\n' for i in range(50_000)))
    assert about_rows(large) == pytest.approx(50_000, rel=0.01)
    other.write_text("a,b\n")
    assert about_rows(other) is None
    assert about_rows(tmp_path / "gone.jsonl") is None
