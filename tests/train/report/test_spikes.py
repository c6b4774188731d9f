"""Losses that stand far above those before them."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path

import pytest

from pyralis.train.report.metric_rows import RunEvent
from pyralis.train.report.metrics import read_metrics
from pyralis.train.report.spikes import LEAST, SpikeDetector
from tests.train.runs import run


def spikes(losses: list[float]) -> list[int]:
    detector = SpikeDetector()
    return [i for i, loss in enumerate(losses) if detector.add(loss) is not None]


def falling(steps: int, noise: float) -> list[float]:
    draw = random.Random(0)
    return [1 + 2 * math.exp(-i / 40) + draw.gauss(0, noise) for i in range(steps)]


@pytest.mark.parametrize("noise", [0.0, 0.02, 0.2])
def test_a_noisy_falling_curve_has_none(noise: float) -> None:
    assert spikes(falling(600, noise)) == []


@pytest.mark.parametrize("noise", [0.0, 0.02, 0.2])
def test_a_jump_is_found(noise: float) -> None:
    losses = falling(200, noise)
    losses[150] += 8 * max(noise, 0.1)
    losses[180] += 8 * max(noise, 0.1)
    assert spikes(losses) == [150, 180]


def test_the_median_before_is_told() -> None:
    detector = SpikeDetector()
    assert [detector.add(2.0) for _ in range(LEAST)] == [None] * LEAST
    assert detector.add(2.2) is None
    assert detector.add(2.3) == 2.0


def test_nothing_is_judged_by_few_losses() -> None:
    assert spikes([1.0] * (LEAST - 1) + [50.0]) == []
    assert spikes([1.0] * LEAST + [50.0]) == [LEAST]


def test_what_is_not_finite_is_passed_over() -> None:
    assert spikes([1.0] * LEAST + [math.nan, math.inf, 50.0]) == [LEAST + 2]


def test_negative_losses() -> None:
    assert spikes([-3.0, -3.1] * 10 + [-1.0]) == [20]


def test_a_run_lists_them_with_their_rows(tiny_llama: Path, tmp_path: Path) -> None:
    """A row of other text among many alike, whatever `logging_steps` is."""
    path, output = tmp_path / "rows.jsonl", tmp_path / "out"
    texts = ["red"] * 110
    texts[100] = "QUIET 4711 zebra"
    rows = [{"conversation": [{"human": "Say", "assistant": text}]} for text in texts]
    path.write_text("\n".join(map(json.dumps, rows)))
    result = run(
        tiny_llama, path, output, max_steps=110, per_device_train_batch_size=1, logging_steps=4,
        train_sampling_strategy="sequential", learning_rate=3e-3,
    )  # fmt: skip
    (event,) = [m for m in read_metrics(output / "metrics.jsonl") if isinstance(m, RunEvent) and m.event == "spike"]
    assert (event.step, list(result.summary.spikes)) == (101, [event])
    assert "QUIET 4711 zebra" in event.message
    assert "QUIET 4711 zebra" in (output / "report.html").read_text()
