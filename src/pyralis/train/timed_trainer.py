"""A Trainer that knows what its time goes into (`part_clock.py`)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from transformers import Trainer, TrainerCallback

from pyralis.train.part_clock import DeviceMark, HostMark, Part, PartClock


class TimedTrainer(Trainer):
    """To stand before the trainers whose calls it times, once `time_parts` was called."""

    parts: PartClock | None = None

    def time_parts(self) -> PartClock:
        """Time the next `train()`. Call it before callbacks are added that read the clock."""
        self.parts = PartClock(DeviceMark if self.args.device.type == "cuda" else HostMark)
        self.add_callback(_Turns(self.parts))
        return self.parts

    @contextmanager
    def timed(self, part: Part) -> Iterator[None]:
        """The time within is this part's, if any is measured."""
        if self.parts is None:
            yield
            return
        with self.parts.within(part):
            yield

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> Any:
        with self.timed("data"):
            return super().get_batch_samples(*args, **kwargs)

    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        with self.timed("compute"):
            return super().training_step(*args, **kwargs)

    def _clip_grad_norm(self, model: Any) -> Any:
        if self.parts is not None:
            self.parts.enter("optimizer")  # which goes on until the step has ended
        return super()._clip_grad_norm(model)

    def _maybe_log_save_evaluate(self, *args: Any, **kwargs: Any) -> None:
        due = self.control.should_log or self.control.should_evaluate or self.control.should_save
        with self.timed("logging" if due else "other"):
            super()._maybe_log_save_evaluate(*args, **kwargs)

    def evaluate(self, *args: Any, **kwargs: Any) -> Any:
        with self.timed("evaluation"):
            return super().evaluate(*args, **kwargs)


class _Turns(TrainerCallback):
    """What only callbacks are told of."""

    def __init__(self, parts: PartClock) -> None:
        self.parts = parts

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        self.parts.start()

    def on_pre_optimizer_step(self, *_: Any, **__: Any) -> None:
        self.parts.enter("optimizer")

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.parts.enter("other")

    def on_train_end(self, *_: Any, **__: Any) -> None:
        self.parts.stop()
