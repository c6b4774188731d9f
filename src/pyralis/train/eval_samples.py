"""The sample questions, answered at each evaluation: how answers change while the model learns."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from pyralis.train.report.metric_rows import Metric, SampledAnswers
from pyralis.train.report.metrics import MetricsCallback
from pyralis.train.report.run_report import SampleAnswer


class EvalSamples(TrainerCallback):
    """Records what `answer()` returns, one answer a question, behind each evaluation. Add it behind `metrics`."""

    def __init__(self, questions: Sequence[str], answer: Callable[[], Sequence[str]], metrics: MetricsCallback) -> None:
        self.questions, self.answer, self.metrics = questions, answer, metrics

    def on_evaluate(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        answers = dict(zip(self.questions, self.answer()))
        self.metrics.record_samples(SampledAnswers(state.global_step, state.epoch or 0.0, answers))


def sample_answers(
    questions: Sequence[str], before: Sequence[str], after: Sequence[str], metrics: Sequence[Metric]
) -> tuple[SampleAnswer, ...]:
    """What the report shows of each question: the answers before and after, and by step those in between."""
    taken = [row for row in metrics if isinstance(row, SampledAnswers)]
    return tuple(
        SampleAnswer(question, a, b, [(row.step, row.answers[question]) for row in taken if question in row.answers])
        for question, a, b in zip(questions, before, after)
    )
