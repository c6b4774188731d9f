"""One micro-step of one shape: its forward and its backward recorded once, replayed after that.

The two are separate, since the loss's gradient (loss scaling, accumulation) comes from outside. Both read and write
fixed memory: the batch is copied in, the loss copied out, gradients are added to buffers that are `p.grad` or go there.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from pyralis.engine.buckets import Bucketed
from pyralis.engine.recorders import Recorder
from pyralis.engine.step_gradients import StepGradients
from pyralis.memory.step_store import StepStore
from pyralis.models.block import in_recorded_step
from pyralis.models.model_weights import ModelWeights
from pyralis.ops.attention_spec import AttentionLayout


@dataclass(frozen=True, eq=False)
class StaticBatch:
    """The memory that a recorded step reads its batch from."""

    input_ids: Tensor
    targets: Tensor
    positions: Tensor | None
    num_items: Tensor | None  # [] float32
    layout: AttentionLayout

    @classmethod
    def like(cls, batch: Bucketed, counted: bool) -> StaticBatch:
        """counted: the number that the loss is divided by comes with each batch, too."""
        device, bounds = batch.input_ids.device, batch.layout.cu_seqlens
        return cls(
            batch.input_ids.clone(), batch.targets.to(device, copy=True),
            None if batch.positions is None else batch.positions.to(device, copy=True),
            torch.ones((), dtype=torch.float32, device=device) if counted else None,
            replace(batch.layout, cu_seqlens=None if bounds is None else bounds.clone()),
        )  # fmt: skip

    def fill(self, batch: Bucketed, num_items: Tensor | float | None) -> None:
        pairs = [(self.input_ids, batch.input_ids), (self.targets, batch.targets)]
        bounds = (self.layout.cu_seqlens, batch.layout.cu_seqlens)
        for mine, theirs in ((self.positions, batch.positions), bounds):
            if mine is not None and theirs is not None:
                pairs.append((mine, theirs))
        for mine, theirs in pairs:
            mine.copy_(theirs, non_blocking=True)
        if isinstance(num_items, Tensor):
            assert self.num_items is not None
            self.num_items.copy_(num_items.reshape(()), non_blocking=True)
        elif num_items is not None:
            assert self.num_items is not None
            self.num_items.fill_(num_items)


class CapturedStep:
    """`compute` reads the batch in `static` and returns the loss; recorded here, with its backward.

    store: where inputs of layers wait that are offloaded; it has the room.
    """

    def __init__(
        self, recorder: Recorder, static: StaticBatch, gradients: StepGradients, weights: ModelWeights,
        compute: Callable[[StaticBatch], Tensor], store: StepStore,
    ) -> None:  # fmt: skip
        self.static, self.gradients, self.weights = static, gradients, weights
        # What the layers compute with, held as long as the graphs; by now a layer may have laid out other states.
        self._states = tuple(layer.state for layer in weights.layers)
        self._grad = torch.ones((), dtype=torch.float32, device=static.input_ids.device)
        self._loss: Tensor | None = None

        def forward() -> None:
            store.begin()
            anchor = torch.zeros((), device=static.input_ids.device, requires_grad=True)
            with in_recorded_step(anchor, store):
                self._loss = compute(static)
            store.join()

        def backward() -> None:
            assert self._loss is not None
            self._loss.backward(self._grad.to(self._loss.dtype))
            store.join()

        with gradients.bound(), torch.enable_grad():
            self._forward = recorder.record(forward)
            with torch.autocast(static.input_ids.device.type, enabled=False):  # as backwards usually run
                self._backward = recorder.record(backward)
        if self._loss is not None:  # recorded: the tape has served
            self._loss = self._loss.detach()
        self._host_memory = store.buffers  # which the graphs copy from and to, whatever becomes of the store

    def forward(self, batch: Bucketed, num_items: Tensor | float | None) -> Tensor:
        self.static.fill(batch, num_items)
        self.weights.before_replay(self._states)
        with torch.enable_grad():
            self._forward()
        self.weights.after_replay()
        assert self._loss is not None
        return self._loss.detach().clone()

    def backward(self, grad: Tensor) -> None:
        self._grad.copy_(grad)
        apart = self.gradients.prepare()
        self.weights.before_replay(self._states)  # a forward of another state may have come between
        self._backward()
        self.weights.after_replay()
        self.gradients.settle(apart)


@dataclass(eq=False)
class Replay:
    """One use of a recorded step. recover: makes the gradient where the recorded backward cannot, of the error and the
    gradient of the loss."""

    step: CapturedStep | None  # None once its backward has run: a loss that is kept keeps no graph
    batch: Bucketed
    num_items: Tensor | float | None
    recover: Callable[[Exception, Tensor], None] | None

    @property
    def done(self) -> bool:
        return self.step is None

    def forward(self) -> Tensor:
        assert self.step is not None
        return self.step.forward(self.batch, self.num_items)

    def backward(self, grad: Tensor) -> None:
        if self.step is None or self.recover is None:
            raise RuntimeError(
                "a recorded step was asked for its gradient a second time; the first has overwritten its activations. "
                'Call backward once for each forward, or `use_step_graphs(model, "off")`.'
            )
        failure = self._backward(grad, self.step)
        recover, self.recover = self.recover, None
        if failure is not None:
            recover(failure, grad)

    def _backward(self, grad: Tensor, step: CapturedStep) -> Exception | None:
        self.step = None
        try:
            step.backward(grad)
        except Exception as error:  # whatever it was, the gradient can be computed without the graph
            return error.with_traceback(None)  # its frames hold the step, whose memory may be needed
        return None


def replayed(replay: Replay, inputs: Sequence[Tensor]) -> Tensor:
    """The loss, whose backward is the step's. inputs: tensors that require a gradient; they get none from autograd."""
    return _Replayed.apply(replay, *inputs)  # type: ignore[no-any-return]


class _Replayed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, replay: Replay, *_: Tensor) -> Tensor:
        ctx.replay = replay
        return replay.forward()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[None, ...]:
        ctx.replay.backward(grad)
        return (None,) * len(ctx.needs_input_grad)
