"""Measures a run: the Trainer callback that takes the rows of `metric_rows.py`."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from pyralis.train.report.metric_rows import (
    EvalMetrics,
    EventName,
    Metric,
    MetricsWriter,
    RunEvent,
    SampledAnswers,
    StepMetrics,
    parts_so_far,
    read_metrics,
    rewards_of,
)

__all__ = [
    "EvalMetrics",
    "Metric",
    "MetricsCallback",
    "MetricsWriter",
    "RunEvent",
    "StepMetrics",
    "peak_memory_gib",
    "read_metrics",
]


class MetricsCallback(TrainerCallback):
    """Measures a run of the HF Trainer. Add it before the callbacks that read `latest` and `history`.

    `counts` returns the (supervised, all) tokens of the run so far, over all ranks and resumed parts. `writer` is None
    on every rank but the first. `mfu` turns tokens per second into a share of the peak. `parts` returns the seconds of
    this process's training by part. The first and the last step are always logged, whatever `logging_steps` says.
    """

    def __init__(
        self,
        writer: MetricsWriter | None,
        counts: Callable[[], tuple[int, int]],
        mfu: Callable[[float], float] | None = None,
        parts: Callable[[], Mapping[str, float]] | None = None,
    ) -> None:
        self.writer, self.counts, self.mfu, self.parts = writer, counts, mfu, parts
        self.history: list[Metric] = list(writer.kept) if writer else []
        self.latest: StepMetrics | None = None
        self._step = self._window_step = 0
        self._begin = self._window_begin = self._mark = time.perf_counter()
        self._aside = self._elapsed_before = 0.0
        self._window_counts = (0, 0)
        self._parts_before = parts_so_far(self.history)

    def record_event(self, event: EventName, message: str = "", step: int | None = None) -> None:
        """For what the Trainer has no callback for. step: the present one unless given."""
        self._event(event, self._step if step is None else step, message)

    def record_at(self, event: EventName, step: int, message: str) -> None:
        """The same, as `WatchedTrainer.watch_steps` tells it."""
        self.record_event(event, message, step)

    def record_samples(self, samples: SampledAnswers) -> None:
        """Answers taken at an evaluation; the time that they took is kept out of the rates."""
        self._set_aside()
        self._record(samples)

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self._begin = self._window_begin = self._mark = time.perf_counter()
        self._aside = 0.0
        self._step = self._window_step = state.global_step
        self._window_counts = self.counts()
        timed = (m.elapsed_seconds for m in self.history if isinstance(m, StepMetrics | RunEvent))
        self._elapsed_before = max(timed, default=0.0)
        self._event("resume" if state.global_step else "start", state.global_step)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self._mark = time.perf_counter()
        self._step = state.global_step
        if state.global_step == 1 or state.global_step >= state.max_steps:
            control.should_log = True

    def on_epoch_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if control.should_training_stop:  # stopped early: HF logs again only if this step was not logged
            control.should_log = True

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        logs: dict[str, float] = kwargs["logs"]
        if "loss" not in logs:  # the evaluation's and the final summary come this way too
            return
        self._mark = time.perf_counter()
        seconds = max(self._mark - self._window_begin - self._aside, 1e-9)
        totals = self.counts()
        supervised, total = (now - then for now, then in zip(totals, self._window_counts))
        device_gib, host_gib = peak_memory_gib()
        self.latest = StepMetrics(
            step=state.global_step,
            epoch=state.epoch or 0.0,
            loss=logs["loss"],
            learning_rate=logs["learning_rate"],
            grad_norm=logs.get("grad_norm"),
            supervised_tokens=totals[0],
            total_tokens=totals[1],
            supervised_tokens_per_second=supervised / seconds,
            total_tokens_per_second=total / seconds,
            peak_memory_gib=device_gib,
            peak_host_memory_gib=host_gib,
            elapsed_seconds=self._elapsed(),
            mfu=self.mfu(total / seconds) if self.mfu else None,
            window_steps=state.global_step - self._window_step,
            seconds_by_part=self._by_part(),
            **rewards_of(logs),
        )
        self._record(self.latest)
        if not math.isfinite(self.latest.loss) and not self._seen("nan") and not self._seen("skipped"):
            self._event("nan", state.global_step, f"the loss is {self.latest.loss}")
        self._window_begin, self._window_counts, self._window_step = self._mark, totals, state.global_step
        self._aside = 0.0

    def on_evaluate(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self._set_aside()
        metrics: dict[str, Any] = kwargs["metrics"]
        if (loss := metrics.get("eval_loss")) is None:
            return
        rewards = rewards_of(metrics, "eval_")
        perplexity = math.exp(loss) if loss < 700 else math.inf if loss == loss else math.nan
        self._record(
            EvalMetrics(
                step=state.global_step,
                epoch=state.epoch or 0.0,
                loss=loss,
                perplexity=perplexity if rewards["reward_margin"] is None else None,
                tokens=metrics.get("eval_tokens"),
                seconds=metrics.get("eval_runtime"),
                **rewards,
            )
        )

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self._set_aside()
        self._event("checkpoint", state.global_step)

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self._event("end", state.global_step)

    def _seen(self, event: EventName) -> bool:
        return any(isinstance(metric, RunEvent) and metric.event == event for metric in self.history)

    def _elapsed(self) -> float:
        return self._elapsed_before + time.perf_counter() - self._begin

    def _set_aside(self) -> None:
        """Keep the time since the last mark (an evaluation, a save) out of the window's rates."""
        now = time.perf_counter()
        self._aside += now - self._mark
        self._mark = now

    def _event(self, event: EventName, step: int, message: str = "") -> None:
        self._record(RunEvent(event, step, *self.counts(), self._elapsed(), message, self._by_part()))

    def _by_part(self) -> dict[str, float] | None:
        if self.parts is None:
            return None
        return {part: round(self._parts_before.get(part, 0.0) + now, 3) for part, now in self.parts().items()}

    def _record(self, metric: Metric) -> None:
        self.history.append(metric)
        if self.writer:
            self.writer.write(metric)


def peak_memory_gib() -> tuple[float | None, float | None]:
    """(peak allocated on this process's GPU, None), or (None, peak of the process in host memory) without one."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**30, None
    if sys.platform == "win32":
        return None, None
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return None, peak * (1 if sys.platform == "darwin" else 1024) / 2**30  # bytes on macOS, KiB elsewhere
