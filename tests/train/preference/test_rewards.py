"""What is shown of preference training: rewards in rows, summary, panel, live line and report."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from pyralis.train.report.format import rewards_text
from pyralis.train.report.metric_rows import EvalMetrics, Metric, StepMetrics, from_json, rewards_of, to_json
from pyralis.train.report.panel import FinalInfo, final_panel
from pyralis.train.report.reward_chart import reward_chart
from pyralis.train.report.summary import summarise


@pytest.fixture
def preferences(make_step: Callable[..., StepMetrics]) -> list[Metric]:
    rows: list[Metric] = [
        make_step(
            step, 0.7 / step, reward_chosen=0.1 * step, reward_rejected=-0.2 * step, reward_margin=0.3 * step,
            reward_accuracy=min(0.4 + 0.1 * step, 1.0),
        )
        for step in range(1, 9)
    ]  # fmt: skip
    return rows


def test_rows_are_written_and_read(preferences: list[Metric], make_step: Callable[..., StepMetrics]) -> None:
    assert [from_json(to_json(row)) for row in preferences] == preferences
    assert "reward_" not in to_json(make_step(1, 0.5))
    measured = EvalMetrics(8, 1.0, 0.5, None, None, 2.0, reward_margin=float("nan"), reward_accuracy=0.5)
    back = from_json(to_json(measured))
    assert isinstance(back, EvalMetrics)
    assert back.reward_margin != back.reward_margin
    assert rewards_of({"eval_rewards/margins": 0.5}, "eval_")["reward_margin"] == 0.5
    assert set(rewards_of({}).values()) == {None}


def test_summary_prefers_the_evaluation(preferences: list[Metric], history: list[Metric]) -> None:
    assert summarise(history).rewards is None
    rewards = summarise(preferences).rewards
    assert rewards is not None
    assert (rewards.first_accuracy, rewards.last_accuracy, rewards.evaluated) == (0.5, 1.0, False)
    assert (rewards.first_margin, rewards.last_margin) == pytest.approx((0.3, 2.4))
    measured = [EvalMetrics(s, 1.0, 0.5, None, None, 2.0, 0.1, 0.0, 0.1 * s, 0.9) for s in (4, 8)]
    rewards = summarise([*preferences, *measured]).rewards
    assert rewards is not None
    assert (rewards.last_margin, rewards.evaluated) == (0.8, True)


def test_final_panel(preferences: list[Metric], tmp_path: Path) -> None:
    console = Console(file=StringIO(), width=100)
    console.print(final_panel(FinalInfo(summarise(preferences), tmp_path)))
    assert "50 % → 100 % right · margin 0.3 → 2.4" in console.file.getvalue()  # type: ignore[attr-defined]


def test_chart(preferences: list[Metric], history: list[Metric]) -> None:
    assert reward_chart(history) is None
    chart = reward_chart(preferences)
    assert chart is not None
    for kind in ("chosen", "rejected", "rate"):
        assert chart.svg.count(f'<path class="{kind}"') == 1
    assert "step 8: 0.8" in chart.svg
    first: Any = preferences[0]
    broken = reward_chart([replace(first, reward_chosen=float("nan")), *preferences[1:]])
    assert broken is not None
    assert "nan" not in broken.svg
    assert broken.data["curves"][0]["values"][0] is None
    assert reward_chart(preferences[:1]) is not None


def test_text() -> None:
    assert rewards_text(0.8125, 0.41234) == "rewards 81 % right, margin 0.412"
    assert rewards_text(0.8125, 0.41234, chinese=True) == "奖励 81 % 正确，差 0.412"
    assert rewards_text(None, None) == ""
