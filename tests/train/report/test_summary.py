"""The figures and the verdict of a run."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable

import pytest

from pyralis.train.report.metric_rows import EvalMetrics, Metric, RunEvent, StepMetrics
from pyralis.train.report.summary import summarise


def test_figures(history: list[Metric]) -> None:
    steps = [m for m in history if isinstance(m, StepMetrics)]
    evals = [m for m in history if isinstance(m, EvalMetrics)]
    summary = summarise(history)
    assert (summary.steps, summary.epochs, summary.seconds) == (40, 1.0, 20.5)
    assert (summary.first_loss, summary.last_loss) == (steps[0].loss, steps[-1].loss)
    assert (summary.first_eval_loss, summary.last_eval_loss) == (evals[0].loss, evals[-1].loss)
    assert (summary.best_eval_loss, summary.best_eval_step) == (evals[-1].loss, 40)
    assert (summary.supervised_tokens, summary.total_tokens) == (4000, 10000)
    assert summary.supervised_tokens_per_second == pytest.approx(200)
    assert summary.total_tokens_per_second == pytest.approx(500)
    assert (summary.peak_memory_gib, summary.peak_host_memory_gib) == (None, 1.25)
    assert summary.verdict.mood == "good"
    assert summary.verdict.english.startswith(
        "The loss fell by 78 % in 40 steps (2.4208 → 0.5213, means of the first and the last tenth)"
    )


def test_rates_are_weighted_by_time(make_step: Callable[..., StepMetrics]) -> None:
    fast = make_step(1, 1.0, total_tokens=1000, total_tokens_per_second=1000.0)
    slow = make_step(2, 1.0, total_tokens=2000, total_tokens_per_second=250.0)
    assert summarise([fast, slow]).total_tokens_per_second == pytest.approx(2000 / 5)


def test_verdicts(history: list[Metric], make_step: Callable[..., StepMetrics]) -> None:
    def verdict(*metrics: Metric) -> tuple[str, str]:
        found = summarise(metrics).verdict
        assert found.chinese
        return found.mood, found.english

    assert verdict() == ("bad", "No step was trained.")
    assert verdict(make_step(1, 2.0))[0] == "warn"
    assert verdict(make_step(1, 2.0), make_step(9, 2.1))[1].startswith("The loss did not fall in 9 steps")
    noisy = [make_step(i, 2.0 - i / 100 + (0.5 if i in (1, 50) else 0) * (-1 if i == 1 else 1)) for i in range(1, 51)]
    assert noisy[-1].loss > noisy[0].loss
    assert verdict(*noisy)[1].startswith("The loss fell")  # single losses say little
    mood, text = verdict(make_step(1, 2.0), make_step(7, math.nan), make_step(8, 1.0))
    assert (mood, "nan by step 7" in text) == ("bad", True)
    risen = EvalMetrics(50, 1.2, 1.0, math.e, None, None)
    mood, text = verdict(*history, risen)
    assert (mood, "lowest at step 40" in text, "risen to 1.0000" in text) == ("warn", True, True)
    mood, text = verdict(*history[:-1], RunEvent("interrupted", 40, 0, 0, 1.0))
    assert (mood, text[:24]) == ("warn", "Interrupted at step 40. ")


def test_a_lone_evaluation_that_is_not_finite(make_step: Callable[..., StepMetrics]) -> None:
    broken = EvalMetrics(2, 0.1, math.nan, math.nan, None, None)
    summary = summarise([make_step(1, 2.0), make_step(2, 1.0), broken])
    assert summary.best_eval_loss is None
    assert summary.verdict.mood == "good"


def test_a_loss_of_nothing(make_step: Callable[..., StepMetrics]) -> None:
    rows = [dataclasses.replace(make_step(step, 0.0), total_tokens_per_second=0.0) for step in (1, 2)]
    assert summarise(rows).total_tokens_per_second is None
    assert summarise(rows).verdict.mood == "warn"
