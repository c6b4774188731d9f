"""Ctrl-C and SIGTERM: finish the step, save a checkpoint, stop. A second Ctrl-C stops at once.

Of several processes each hears of it in a step of its own. At the end of each step they tell one another, over a
group on the CPU that no GPU is waited for, so that all stop in the same one.
"""

from __future__ import annotations

import signal
import threading
from types import FrameType, TracebackType
from typing import Any

import torch
from torch import distributed
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments


class GracefulStop:
    """Context manager that turns the first SIGINT or SIGTERM into a flag, and the second SIGINT into KeyboardInterrupt.

    A second SIGTERM changes nothing: schedulers send it to a launcher and to its processes, and the launcher passes it
    on.
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
        if self.requested is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.requested = signal.Signals(number).name


class StopCallback(TrainerCallback):
    """At the end of the step in which a stop was requested: save a checkpoint and end the training loop."""

    def __init__(self, stop: GracefulStop) -> None:
        self.stop = stop
        self._group: Any = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if args.world_size > 1 and distributed.is_initialized():
            self._group = distributed.new_group(backend="gloo")

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> TrainerControl:
        if self._group is not None:
            self.stop.requested = self._agreed(self.stop.requested)
        if self.stop.requested is not None and state.global_step < state.max_steps:
            control.should_log = True
            control.should_save = True
            control.should_training_stop = True
            if args.save_total_limit == 1:  # with 1 Trainer deletes, at its end, all checkpoints but the best
                args.save_total_limit = 2
        return control

    def _agreed(self, requested: str | None) -> str | None:
        """The signal that any of the processes got; SIGTERM before SIGINT."""
        names = [None, *(number.name for number in GracefulStop.SIGNALS)]
        heard = torch.tensor(names.index(requested))
        distributed.all_reduce(heard, distributed.ReduceOp.MAX, group=self._group)
        return names[int(heard)]
