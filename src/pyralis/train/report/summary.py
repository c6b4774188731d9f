"""What a run came to, computed from its metrics: the same figures for the final panel and the report."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from pyralis.train.report.format import loss_text, number_of, percent_text
from pyralis.train.report.metric_rows import EvalMetrics, Metric, RunEvent, StepMetrics, parts_so_far

OVERFIT_RISE = 0.02
"""How far, as a share, the evaluation loss may rise above its minimum before we speak of overfitting."""


@dataclass(frozen=True, slots=True)
class Verdict:
    """One sentence on the run, in English and Chinese."""

    mood: Literal["good", "warn", "bad"]
    english: str
    chinese: str


@dataclass(frozen=True, slots=True)
class Rewards:
    """Of preference training: how often the chosen answer had the higher reward, and by how much, first and last
    logged; on the evaluation data where there is some."""

    first_accuracy: float
    last_accuracy: float
    first_margin: float
    last_margin: float
    evaluated: bool


@dataclass(frozen=True, slots=True)
class RunSummary:
    """Losses are the logged ones (means over their window); rates are of the whole run, evaluation and saving aside."""

    steps: int
    epochs: float
    first_loss: float | None
    last_loss: float | None
    first_eval_loss: float | None
    last_eval_loss: float | None
    best_eval_loss: float | None
    best_eval_step: int | None
    seconds: float
    supervised_tokens: int
    total_tokens: int
    supervised_tokens_per_second: float | None
    total_tokens_per_second: float | None
    peak_memory_gib: float | None
    peak_host_memory_gib: float | None
    verdict: Verdict
    rewards: Rewards | None = None
    skipped: Sequence[RunEvent] = ()  # steps left out because a loss or gradient was not finite
    spikes: Sequence[RunEvent] = ()  # steps whose loss stands out (spikes.py)
    seconds_by_part: Mapping[str, float] = field(default_factory=dict)  # empty where it was not measured


def summarise(metrics: Sequence[Metric]) -> RunSummary:
    steps = [m for m in metrics if isinstance(m, StepMetrics)]
    evals = [m for m in metrics if isinstance(m, EvalMetrics)]
    events = [m for m in metrics if isinstance(m, RunEvent)]
    best = min((m for m in evals if math.isfinite(m.loss)), key=lambda m: m.loss, default=None)
    last = steps[-1] if steps else None
    return RunSummary(
        steps=last.step if last else 0,
        epochs=last.epoch if last else 0.0,
        first_loss=steps[0].loss if steps else None,
        last_loss=last.loss if last else None,
        first_eval_loss=evals[0].loss if evals else None,
        last_eval_loss=evals[-1].loss if evals else None,
        best_eval_loss=best.loss if best else None,
        best_eval_step=best.step if best else None,
        seconds=max([m.elapsed_seconds for m in steps] + [m.elapsed_seconds for m in events], default=0.0),
        supervised_tokens=last.supervised_tokens if last else 0,
        total_tokens=last.total_tokens if last else 0,
        supervised_tokens_per_second=_mean_rate(steps, "supervised_tokens"),
        total_tokens_per_second=_mean_rate(steps, "total_tokens"),
        peak_memory_gib=max((m.peak_memory_gib for m in steps if m.peak_memory_gib is not None), default=None),
        peak_host_memory_gib=max(
            (m.peak_host_memory_gib for m in steps if m.peak_host_memory_gib is not None), default=None
        ),
        verdict=_verdict([m for m in steps if not _left_out(m, events)], evals, events, best),
        rewards=_rewards(evals) or _rewards(steps),
        skipped=[m for m in events if m.event == "skipped"],
        spikes=[m for m in events if m.event == "spike"],
        seconds_by_part=parts_so_far(metrics),
    )


def _left_out(row: StepMetrics, events: Sequence[RunEvent]) -> bool:
    """Whether a loss is not finite because a step of its window was left out."""
    first = row.step - row.window_steps
    return not math.isfinite(row.loss) and any(e.event == "skipped" and first < e.step <= row.step for e in events)


def _rewards(rows: Sequence[StepMetrics] | Sequence[EvalMetrics]) -> Rewards | None:
    found = [(m.reward_accuracy, m.reward_margin) for m in rows]
    known = [(accuracy, margin) for accuracy, margin in found if accuracy is not None and margin is not None]
    if not known:
        return None
    (first_accuracy, first_margin), (last_accuracy, last_margin) = known[0], known[-1]
    evaluated = isinstance(rows[0], EvalMetrics)
    return Rewards(first_accuracy, last_accuracy, first_margin, last_margin, evaluated)


def _mean_rate(steps: Sequence[StepMetrics], name: str) -> float | None:
    """Tokens / seconds over the windows; the seconds of a window follow from its tokens and its rate."""
    tokens = seconds = 0.0
    before = 0
    for row in steps:
        window, rate = getattr(row, name) - before, getattr(row, f"{name}_per_second")
        before = getattr(row, name)
        if rate > 0 and window > 0:
            tokens, seconds = tokens + window, seconds + window / rate
    return tokens / seconds if seconds else None


def _tenth(steps: Sequence[StepMetrics]) -> int:
    """Logged losses of a tenth of the run: single ones of small batches scatter too much to be judged by."""
    return max(len(steps) // 10, 1)


def _level(rows: Sequence[StepMetrics]) -> float:
    """The mean loss over the steps of these windows."""
    return sum(m.loss * m.window_steps for m in rows) / max(sum(m.window_steps for m in rows), 1)


def _verdict(
    steps: Sequence[StepMetrics], evals: Sequence[EvalMetrics], events: Sequence[RunEvent], best: EvalMetrics | None
) -> Verdict:
    if events and events[-1].event == "nan":  # nothing came after it, not even the end
        return Verdict(
            "bad",
            f"Stopped at step {events[-1].step}, whose loss or gradient is not finite.",
            f"训练在第 {events[-1].step} 步停止：该步的损失或梯度不是有限值。",
        )
    if not steps:
        return Verdict("bad", "No step was trained.", "没有训练任何一步。")
    broken = next((m for m in steps if not math.isfinite(m.loss)), None)
    if broken:
        return Verdict(
            "bad",
            f"The loss became {broken.loss} by step {broken.step}: the result is not usable.",
            f"损失在第 {broken.step} 步变为 {broken.loss}，结果不可用。",
        )
    last = steps[-1]
    begin, end = _level(steps[: _tenth(steps)]), _level(steps[-_tenth(steps) :])
    change = (end - begin) / begin if begin else 0.0
    numbers = f"{loss_text(begin)} → {loss_text(end)}"
    of_tenths = ", means of the first and the last tenth" if _tenth(steps) > 1 else ""
    of_tenths_chinese = "，首末各十分之一的平均" if of_tenths else ""
    if len(steps) == 1:
        verdict = Verdict(
            "warn",
            f"One logged step, with a loss of {loss_text(last.loss)}: too short to judge.",
            f"只记录了一步，损失为 {loss_text(last.loss)}，无法判断。",
        )
    elif change < 0:
        verdict = Verdict(
            "good",
            f"The loss fell by {percent_text(-change)} in {number_of(last.step, 'step')} ({numbers}{of_tenths}).",
            f"经过 {last.step} 步，损失下降了 {percent_text(-change)}（{numbers}{of_tenths_chinese}）。",
        )
    else:
        verdict = Verdict(
            "warn",
            f"The loss did not fall in {number_of(last.step, 'step')} ({numbers}{of_tenths}): "
            "look at learning rate and data.",
            f"经过 {last.step} 步，损失没有下降（{numbers}{of_tenths_chinese}），请检查学习率和数据。",
        )
    if best and evals[-1].loss > best.loss * (1 + OVERFIT_RISE):
        verdict = Verdict(
            "warn",
            f"{verdict.english} The evaluation loss was lowest at step {best.step} ({loss_text(best.loss)}) and has "
            f"risen to {loss_text(evals[-1].loss)} since: probably overfitted.",
            f"{verdict.chinese}评估损失在第 {best.step} 步最低（{loss_text(best.loss)}），"
            f"此后升至 {loss_text(evals[-1].loss)}，可能已过拟合。",
        )
    early = next((m for m in events if m.event == "stopped_early"), None)
    if early is not None:
        verdict = Verdict(
            verdict.mood,
            f"{verdict.english} Stopped early at step {early.step}: {early.message}.",
            f"{verdict.chinese}训练在第 {early.step} 步提前停止：评估损失不再下降。",
        )
    if events and events[-1].event == "interrupted":
        verdict = Verdict(
            "warn",
            f"Interrupted at step {events[-1].step}. {verdict.english}",
            f"训练在第 {events[-1].step} 步被中断。{verdict.chinese}",
        )
    return verdict
