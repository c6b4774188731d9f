"""Ctrl-C and SIGTERM: finish the step, save a checkpoint, stop. A second Ctrl-C stops at once."""

from __future__ import annotations

import signal
import threading
from types import FrameType, TracebackType
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments


class GracefulStop:
    """Context manager that turns the first SIGINT or SIGTERM into a flag, and the second into KeyboardInterrupt.

    Signal handlers exist only in the main thread; elsewhere this does nothing. The previous handlers come back on exit.
    """

    SIGNALS = (signal.SIGINT, signal.SIGTERM)

    def __init__(self) -> None:
        self.requested: str | None = None
        self._previous: dict[signal.Signals, Any] = {}

    def __enter__(self) -> GracefulStop:
        if threading.current_thread() is threading.main_thread():
            for number in self.SIGNALS:
                self._previous[number] = signal.signal(number, self._handle)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous.clear()

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.requested is not None:
            raise KeyboardInterrupt
        self.requested = signal.Signals(number).name


class StopCallback(TrainerCallback):
    """At the end of the step in which a stop was requested: save a checkpoint and end the training loop."""

    def __init__(self, stop: GracefulStop) -> None:
        self.stop = stop

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> TrainerControl:
        if self.stop.requested is not None and state.global_step < state.max_steps:
            control.should_log = True
            control.should_save = True
            control.should_training_stop = True
            if args.save_total_limit == 1:  # with 1 Trainer deletes, at its end, all checkpoints but the best
                args.save_total_limit = 2
        return control
