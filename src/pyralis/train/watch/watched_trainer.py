"""A Trainer whose steps are watched (`step_watch.py`), and what it keeps of one that went wrong."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import Trainer

from pyralis.engine.backward_optimizer import BackwardAdamW
from pyralis.train.checkpoints.checkpoint import list_checkpoints
from pyralis.train.report.environment import describe_environment
from pyralis.train.report.metric_rows import EventName
from pyralis.train.watch.batch_rows import batch_rows, to_cpu
from pyralis.train.watch.nan_record import SavedMicroBatch, SavedStep, write_step
from pyralis.train.watch.step_watch import MicroBatch, OnNan, StepWatch, WatchedStep

MOST_WEIGHT_BYTES = 4 << 30


class WatchedTrainer(Trainer):
    """To stand behind `LeanTrainer`, so that it sees losses before any filter."""

    watch: StepWatch | None = None

    def watch_steps(self, on_nan: OnNan, tell: Callable[[EventName, int, str], None]) -> None:
        """From the next `train()` on. on_nan: stop with `NotFiniteError`, or skip the step. tell: of what happens."""
        self.watch = StepWatch(self, on_nan, tell)
        self.add_callback(self.watch)

    def training_step(self, model: nn.Module, inputs: Any, num_items_in_batch: Any = None) -> Tensor:
        loss = super().training_step(model, inputs, num_items_in_batch)
        return loss if self.watch is None else self.watch.saw(inputs, num_items_in_batch, loss)

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        norm = super()._get_grad_norm(model, grad_norm=grad_norm)
        if self.watch is not None:
            self.watch.norm = norm
        return norm

    def _maybe_log_save_evaluate(self, *args: Any, **kwargs: Any) -> None:
        control = self.control
        if self.watch is not None:
            if control.should_log:
                self.watch.before_log()
            if control.should_evaluate or control.should_save or control.should_training_stop:
                self.watch.settle()
        logs = control.should_log
        super()._maybe_log_save_evaluate(*args, **kwargs)
        if logs and self.watch is not None:
            self._tr_loss.zero_()  # Trainer subtracts it from itself, which leaves a NaN in it for good

    # ---- a step that went wrong ----

    def save_bad_step(self, step: WatchedStep, in_a_row: str = "") -> str:
        """Keep the step in the output folder. Returns what there is to say."""
        output_dir = Path(str(self.args.output_dir))
        losses, parameters = self._look_again(step)
        whole = list_checkpoints(output_dir)
        saved = SavedStep(
            step=step.number,
            seed=self.args.seed,
            rank=self.args.process_index,
            loss=float(step.loss),
            micro_batches=tuple(
                SavedMicroBatch(
                    loss,
                    None if micro_batch.num_items is None else float(micro_batch.num_items),
                    tuple(batch_rows(micro_batch.inputs, self.processing_class, self.train_dataset)),
                )
                for micro_batch, loss in zip(step.micro_batches, losses)
            ),
            parameters=parameters,
            checkpoint=whole[-1][1].name if whole else None,
            versions=dict(describe_environment().packages),
        )
        batches = [to_cpu(micro_batch.inputs) for micro_batch in step.micro_batches]
        folder = write_step(output_dir, saved, batches, self._adapter_weights())
        what = f"the loss is {saved.loss}" if not math.isfinite(saved.loss) else "the gradient is not finite"
        there = f"{saved.checkpoint} is whole and is the last one" if whole else "no checkpoint had been saved"
        return (
            f"{in_a_row}step {step.number}: {what}. {saved.where()}Rows of that step: {saved.rows()}. The batch is in "
            f"{folder}: `pyralis replay {folder}` shows where it goes wrong; {there}. Most often learning_rate is too "
            "high, float16 overflows (bf16: true), or a row is broken; on_nan: skip goes on without such steps."
        )

    def _look_again(self, step: WatchedStep) -> tuple[list[float | None], tuple[str, ...] | None]:
        """(the loss of each micro-batch, parameters whose gradient is not finite in the order of the backward), from a
        forward and backward with the weights as they are. None where gradients are not to be had: parts of them lie
        elsewhere, or they are given up in the backward."""
        optimizer: Any = getattr(self.optimizer, "optimizer", self.optimizer)
        if self.is_deepspeed_enabled or self.is_fsdp_enabled or isinstance(optimizer, BackwardAdamW):
            return [None] * len(step.micro_batches), None
        self.model_wrapped.zero_grad()
        losses = [self._loss_again(micro_batch) for micro_batch in step.micro_batches]
        model: Any = self.model
        names = [
            name
            for name, parameter in model.named_parameters()
            if parameter.grad is not None and not bool(parameter.grad.isfinite().all())
        ]
        return [float(loss) for loss in losses], tuple(reversed(names))

    def _loss_again(self, micro_batch: MicroBatch) -> Tensor:
        return super().training_step(self.model_wrapped, micro_batch.inputs, micro_batch.num_items)

    def _adapter_weights(self) -> dict[str, Tensor]:
        """What is trained of an adapter, by its names in the model; nothing of a whole model, or of one in parts."""
        model: Any = self.model
        if not isinstance(model, PeftModel) or self.is_deepspeed_enabled or self.is_fsdp_enabled:
            return {}
        trained = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}
        if sum(p.nbytes for p in trained.values()) > MOST_WEIGHT_BYTES or self.args.process_index:
            return {}
        return {name: torch.empty_like(p, device="cpu").copy_(p) for name, p in trained.items()}
