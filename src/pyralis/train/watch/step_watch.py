"""Steps whose loss or gradient is not finite: the run stops and says which, or goes on without them.

On a GPU nothing waits for a step: its flag is copied to the host behind it and read when the next step has been
launched. Until then the weights are safe. An optimizer that takes `found_inf` (`FlatAdamW`, torch's fused ones) leaves
them as they are by that flag; with `on_nan: stop` the flag stays up until it has been read, so that the weights that
are saved and looked at are those of the step that went wrong. For an optimizer that does not, `on_nan: skip` reads the
flag before each step, and `on_nan: stop` may find its weights spoilt: the checkpoint before is whole, because flags are
read before every log line, evaluation and checkpoint.

A gradient that overflows under float16's loss scale is no NaN: the scale is halved and the step taken later. Below a
scale of 1 it is one.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor
from transformers import TrainerCallback

from pyralis.engine.optimizer import FlatAdamW
from pyralis.errors import NotFiniteError
from pyralis.train.report.metric_rows import EventName
from pyralis.train.report.spikes import SpikeDetector
from pyralis.train.watch.batch_rows import batch_rows
from pyralis.train.watch.nan_record import rows_text

if TYPE_CHECKING:
    from pyralis.train.watch.watched_trainer import WatchedTrainer

OnNan = Literal["stop", "skip"]
MOST_IN_A_ROW = 10
HELD_STEPS = 16
"""The batches of so many steps are kept (ids, no activations), for the rows of a spike."""


@dataclass(frozen=True, slots=True)
class MicroBatch:
    """What a micro-step was given."""

    inputs: dict[str, Any]
    num_items: Any


@dataclass(eq=False, slots=True)
class WatchedStep:
    """An optimizer step. loss: [] on the device, summed over its micro-batches. bad: [] on the host once `ready`."""

    number: int
    micro_batches: list[MicroBatch]
    loss: Tensor
    bad: Tensor | None = None
    ready: torch.cuda.Event | None = None

    def send(self, flag: Tensor) -> None:
        """Let `flag` ([] on the device) be read later."""
        if flag.is_cuda:
            self.bad = torch.empty((), dtype=flag.dtype, pin_memory=True)
            self.bad.copy_(flag, non_blocking=True)
            self.ready = torch.cuda.Event()
            self.ready.record(torch.cuda.current_stream(flag.device))
        else:
            self.bad = flag.clone()

    def is_bad(self) -> bool:
        assert self.bad is not None
        if self.ready is not None:
            self.ready.synchronize()
        return bool(self.bad)


class StepWatch(TrainerCallback):
    """Watches the steps of a `WatchedTrainer`, which tells it of micro-steps and norms.

    tell: (event, step, message) of what a run's metrics should hold.
    """

    def __init__(self, trainer: WatchedTrainer, on_nan: OnNan, tell: Callable[[EventName, int, str], None]) -> None:
        self.trainer, self.on_nan, self.tell = trainer, on_nan, tell
        self.skipped = 0
        self.norm: Any = None  # of the present step's gradient, where it is known before the optimizer's step
        self._in_a_row = 0
        self._micro_batches: list[MicroBatch] = []
        self._loss: Tensor | None = None
        self._last_loss: Tensor | None = None
        self._bad: Tensor | None = None
        self._flag: Tensor | None = None  # of the step before, on the device
        self._unread: deque[WatchedStep] = deque()
        self._since_log: list[tuple[int, Tensor]] = []
        self._held: deque[WatchedStep] = deque(maxlen=HELD_STEPS)
        self._spikes = SpikeDetector()

    # ---- told by the trainer ----

    def saw(self, inputs: dict[str, Any], num_items: Any, loss: Tensor) -> Tensor:
        """A micro-step was made. Returns the loss that counts for the log: with `on_nan: skip` one that is not finite
        is that of the micro-batch before."""
        self._micro_batches.append(MicroBatch(inputs, num_items))
        loss = loss.detach()
        self._loss = loss if self._loss is None else self._loss + loss
        if self.on_nan == "skip":
            loss = loss if self._last_loss is None else torch.where(loss.isfinite(), loss, self._last_loss)
            self._last_loss = loss
        return loss

    def settle(self) -> None:
        """Read every flag there is: before what has been learnt is logged, measured or saved."""
        while self._unread:
            self._read(self._unread.popleft())

    def before_log(self) -> None:
        """Settle, and look for spikes among the losses since the last log, which Trainer reads now as well."""
        self.settle()
        if not self._since_log:
            return
        losses = torch.stack([loss.float() for _, loss in self._since_log])
        losses = self._reduced(losses, torch.distributed.ReduceOp.SUM) / self.trainer.args.world_size
        for (number, _), loss in zip(self._since_log, losses.tolist()):
            if (usual := self._spikes.add(loss)) is not None:
                text = f"loss {loss:.4g}; the median of the steps before is {usual:.4g}"
                self.tell("spike", number, f"{text}{self._rows_of(number)}")
        self._since_log.clear()

    # ---- callbacks ----

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._forget_step()
        self._last_loss = None

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        assert self._loss is not None
        bad, optimizer = ~self._loss.isfinite(), self._optimizer
        norm = None if isinstance(optimizer, FlatAdamW) else _local(self.norm)  # which knows it in its step only
        if norm is not None:
            bad = bad | self._counts(~torch.as_tensor(norm, device=bad.device).isfinite())
        self._bad = bad = self._reduced(bad.float(), torch.distributed.ReduceOp.MAX)
        if not self._reads_late(bad) or (self.on_nan == "skip" and not self._heeds_flag):
            if bool(bad):  # the step has not been taken
                if self.on_nan == "stop":
                    self._stop(self._present(state.global_step + 1))
                for group in optimizer.param_groups:
                    for parameter in group["params"]:
                        parameter.grad = None
        elif self._heeds_flag:
            if self.on_nan == "stop" and self._unread and self._flag is not None:
                bad = torch.maximum(bad, self._flag)  # it stays up
            optimizer.found_inf = bad

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        assert self._bad is not None
        flag, optimizer = self._bad, self._optimizer
        if self._heeds_flag:
            vars(optimizer).pop("found_inf", None)
        if isinstance(optimizer, FlatAdamW):
            flag = torch.maximum(flag, self._counts(optimizer.skipped != 0).float())
        self._flag = flag
        step = self._present(state.global_step + 1)
        step.send(flag)
        self._unread.append(step)
        self._since_log.append((step.number, step.loss))
        self._held.append(step)
        self._forget_step()
        while len(self._unread) > int(self._reads_late(flag)):
            self._read(self._unread.popleft())

    # ---- a step that went wrong ----

    def _read(self, step: WatchedStep) -> None:
        if not step.is_bad():
            self._in_a_row = 0
            return
        if self.on_nan == "stop":
            self._stop(step)
        self.skipped += 1
        self._in_a_row += 1
        if self._in_a_row > MOST_IN_A_ROW:
            self._stop(step)
        what = "the loss" if not bool(step.loss.isfinite()) else "the gradient"
        self.tell("skipped", step.number, f"{what} is not finite; the step was left out{self._rows_of(step.number)}")

    def _stop(self, step: WatchedStep) -> None:
        self._unread.clear()
        in_a_row = f"{self._in_a_row} steps in a row; the last of them, " if self._in_a_row > MOST_IN_A_ROW else ""
        message = self.trainer.save_bad_step(step, in_a_row)
        self.tell("nan", step.number, message)
        raise NotFiniteError(message)

    def _present(self, number: int) -> WatchedStep:
        assert self._loss is not None
        return WatchedStep(number, self._micro_batches, self._loss)

    def _forget_step(self) -> None:
        self._micro_batches, self._loss, self.norm, self._bad = [], None, None, None

    def _rows_of(self, number: int) -> str:
        step = next((step for step in self._held if step.number == number), None)
        tokenizer = self.trainer.processing_class
        found = [row for m in step.micro_batches for row in batch_rows(m.inputs, tokenizer)] if step else []
        return f"; rows: {rows_text(found)}" if found else ""

    # ---- what there is to know of the optimizer ----

    @staticmethod
    def _reads_late(flag: Tensor) -> bool:
        """Whether reading a flag at once would wait for the device."""
        return flag.is_cuda

    @property
    def _optimizer(self) -> Any:
        optimizer: Any = self.trainer.optimizer
        return getattr(optimizer, "optimizer", optimizer)

    @property
    def _scaler(self) -> Any:
        return getattr(self.trainer.accelerator, "scaler", None)

    @property
    def _heeds_flag(self) -> bool:
        """Whether the optimizer's step can be called off by a flag on the device, and nobody else does it."""
        optimizer = self._optimizer
        return self._scaler is None and bool(getattr(optimizer, "_step_supports_amp_scaling", False))

    def _counts(self, overflow: Tensor) -> Tensor:
        """Whether a gradient that is not finite counts: under a loss scale only where that is below 1."""
        scale = getattr(self._scaler, "_scale", None)  # `get_scale` would wait for the GPU
        return overflow if not isinstance(scale, Tensor) else overflow & (scale < 1).to(overflow.device)

    def _reduced(self, tensor: Tensor, operation: Any) -> Tensor:
        """Over all processes, which have to take the same decisions."""
        if self.trainer.args.world_size > 1 and torch.distributed.is_initialized():
            torch.distributed.all_reduce(tensor, operation)
        return tensor


def _local(norm: Any) -> Any:
    """A norm that FSDP holds as a distributed tensor, as one of its own."""
    return norm.full_tensor() if hasattr(norm, "full_tensor") else norm
