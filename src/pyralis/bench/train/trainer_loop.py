"""Steps through a `transformers.Trainer` or a subclass, timed by a callback."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from datasets import Dataset
from torch import Tensor
from transformers import TrainerCallback

from pyralis.bench.train.clock import Measured, StepClock
from pyralis.bench.train.settings import Shape, TrainBench


@dataclass(eq=False)
class ClockCallback(TrainerCallback):
    """Ticks at the end of each step; has the first losses logged, and none after them."""

    clock: StepClock

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.clock.start()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
        control.should_log = self.clock.wants_loss
        self.clock.tick()
        return control

    def on_log(self, args: Any, state: Any, control: Any, logs: Mapping[str, Any] | None = None, **kwargs: Any) -> None:
        if logs is not None and "loss" in logs:
            self.clock.add_loss(float(logs["loss"]))


def trainer_arguments(bench: TrainBench, shape: Shape, clock: StepClock, folder: Path) -> dict[str, Any]:
    """What every peer's arguments have in common; what is not named here is as the peer has it.

    8-bit AdamW, a constant learning rate, no accumulation, clipping to norm 1 (the default).
    """
    on_gpu = clock.device.type == "cuda"
    return {
        "output_dir": str(folder),
        "per_device_train_batch_size": shape.batch,
        "max_steps": clock.total,
        "learning_rate": bench.learning_rate,
        "lr_scheduler_type": "constant",
        "weight_decay": 0.0,
        "optim": "adamw_8bit",
        "logging_steps": 1_000_000,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "remove_unused_columns": False,  # TRL would drop the mask, which it then misses
        "train_sampling_strategy": "sequential",
        "use_cpu": not on_gpu,
    }


def training_rows(batch: Mapping[str, Tensor], steps: int) -> Dataset:
    """The rows of `steps` equal batches."""
    return Dataset.from_dict({name: values.tolist() * steps for name, values in batch.items()})


def run_trainer(trainer: Any, clock: StepClock) -> Measured:
    trainer.add_callback(ClockCallback(clock))
    trainer.train()
    return clock.measured()
