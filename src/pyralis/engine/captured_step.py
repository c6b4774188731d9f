"""One micro-step of one shape: its forward and its backward recorded once, replayed after that.

The two are separate, since the loss's gradient (loss scaling, accumulation) comes from outside. Both read and write
fixed memory: the batch is copied in, the loss copied out, gradients are added to buffers that are `p.grad` or go there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor, nn

from pyralis.engine.buckets import Bucketed
from pyralis.models.block import standing_for_parameters
from pyralis.models.gradients import FlatGradients
from pyralis.models.model_weights import ModelWeights
from pyralis.ops._capture import mend_capture
from pyralis.ops.attention_spec import AttentionLayout

Work = Callable[[], None]


class Recorder(Protocol):
    """Makes work repeatable."""

    def record(self, work: Work) -> Work: ...

    def renew(self) -> None:
        """All that was recorded is gone."""

    def mend(self) -> None:
        """A recording has failed."""


class Rerun:
    """Where nothing can be captured (a CPU): the work itself. For tests of everything around the capture."""

    def record(self, work: Work) -> Work:
        return work

    def renew(self) -> None:
        """Nothing is kept."""

    def mend(self) -> None:
        """Nothing is left in between."""


class CudaGraphs:
    """CUDA graphs in one memory pool. What is replayed must alternate as it was captured: a forward, its backward."""

    def __init__(self, device: torch.device) -> None:
        self._pool = torch.cuda.graph_pool_handle()
        self._stream = torch.cuda.Stream(device)

    def record(self, work: Work) -> Work:
        graph = torch.cuda.CUDAGraph()
        # Other threads (a data loader that pins memory) may go on meanwhile.
        with torch.cuda.graph(graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"):
            work()
        return graph.replay

    def renew(self) -> None:
        self._pool = torch.cuda.graph_pool_handle()  # a pool dies with its last graph
        torch.cuda.empty_cache()

    def mend(self) -> None:
        mend_capture()


class StepGradients:
    """Fixed buffers for the gradients of everything trained, and what `p.grad` has to do with them."""

    def __init__(self, parameters: Sequence[nn.Parameter], flat: FlatGradients) -> None:
        self.parameters = tuple(parameters)
        self.views = tuple(torch.zeros_like(p) if (view := flat.view(p)) is None else view for p in self.parameters)
        inside = {id(p) for p in self.parameters}
        self._whole = all(id(p) in inside for p in flat.parameters)  # buffers hold nobody else's gradients
        self._buffers = list({id(b): b for v in self.views for b in [v if v._base is None else v._base]}.values())

    @contextmanager
    def bound(self) -> Iterator[None]:
        """With every `p.grad` its buffer: what is recorded then adds to it."""
        before = [p.grad for p in self.parameters]
        for p, view in zip(self.parameters, self.views):
            p.grad = view
        try:
            yield
        finally:
            for p, grad in zip(self.parameters, before):
                p.grad = grad

    def prepare(self) -> list[tuple[Tensor, Tensor]]:
        """Bring buffers to where a backward adds to them. Returns (p.grad, buffer) where they are two; see `settle`."""
        fresh = [i for i, p in enumerate(self.parameters) if p.grad is None]
        pairs = () if len(fresh) == len(self.parameters) else zip(self.parameters, self.views)
        other = [i for i, (p, view) in enumerate(pairs) if p.grad is not None and p.grad is not view]
        with torch.no_grad():
            if len(fresh) == len(self.parameters) and self._whole:
                torch._foreach_zero_(self._buffers)
            elif fresh or other:
                torch._foreach_zero_([self.views[i] for i in (*fresh, *other)])
        for i in fresh:
            self.parameters[i].grad = self.views[i]
        return [(grad, self.views[i]) for i in other if (grad := self.parameters[i].grad) is not None]

    @staticmethod
    def settle(apart: list[tuple[Tensor, Tensor]]) -> None:
        """Add what a backward left in buffers that are not `p.grad`."""
        if apart:
            with torch.no_grad():
                torch._foreach_add_([grad for grad, _ in apart], [buffer for _, buffer in apart])


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
    """`compute` reads the batch in `static` and returns the loss; recorded here, with its backward."""

    def __init__(
        self, recorder: Recorder, static: StaticBatch, gradients: StepGradients, weights: ModelWeights,
        compute: Callable[[StaticBatch], Tensor],
    ) -> None:  # fmt: skip
        self.static, self.gradients, self.weights = static, gradients, weights
        self._grad = torch.ones((), dtype=torch.float32, device=static.input_ids.device)
        self._loss: Tensor | None = None

        def forward() -> None:
            anchor = torch.zeros((), device=static.input_ids.device, requires_grad=True)
            with standing_for_parameters(anchor):
                self._loss = compute(static)

        def backward() -> None:
            assert self._loss is not None
            self._loss.backward(self._grad.to(self._loss.dtype))

        with gradients.bound(), torch.enable_grad():
            self._forward = recorder.record(forward)
            self._backward = recorder.record(backward)
        if self._loss is not None:  # recorded: the tape has served
            self._loss = self._loss.detach()

    def forward(self, batch: Bucketed, num_items: Tensor | float | None) -> Tensor:
        self.static.fill(batch, num_items)
        with torch.enable_grad():
            self._forward()
        self.weights.after_replay()
        assert self._loss is not None
        return self._loss.detach().clone()

    def backward(self, grad: Tensor) -> None:
        self._grad.copy_(grad)
        apart = self.gradients.prepare()
        self._backward()
        self.weights.after_replay()
        self.gradients.settle(apart)
