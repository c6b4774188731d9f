"""Early stopping, resumed where it was: the training ends when the evaluation loss no longer falls."""

from __future__ import annotations

from typing import Any

from transformers import EarlyStoppingCallback, TrainerControl, TrainerState, TrainingArguments

from pyralis.train.report.metrics import MetricsCallback


class EarlyStop(EarlyStoppingCallback):
    """transformers' callback. Its count of evaluations without a gain goes on in a resumed run, and the metrics say
    that it stopped the run. Add it behind `metrics`."""

    def __init__(self, patience: int, threshold: float, metrics: MetricsCallback) -> None:
        super().__init__(patience, threshold)
        self.metrics = metrics

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Not the parent's, which advises what `pyralis train` has checked."""
        states: Any = state.stateful_callbacks  # a dictionary by now, whatever its annotation says
        saved = states.get(type(self).__name__) if state.global_step else None
        self.early_stopping_patience_counter = saved["attributes"]["early_stopping_patience_counter"] if saved else 0

    def on_evaluate(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, *more: Any, **kwargs: Any
    ) -> None:
        super().on_evaluate(args, state, control, *more, **kwargs)
        if self.early_stopping_patience_counter >= self.early_stopping_patience and state.global_step < state.max_steps:
            count = self.early_stopping_patience
            evaluations = "the last evaluation" if count == 1 else f"{count} evaluations in a row"
            by = f" by more than {self.early_stopping_threshold:g}" if self.early_stopping_threshold else ""
            self.metrics.record_event("stopped_early", f"{evaluations} did not bring the loss below its lowest{by}")
