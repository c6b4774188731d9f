"""The training loss of a fast causal LM from recorded steps: on a GPU, one launch for a forward and one for a backward.

`use_step_graphs(model)` puts it between `causal_lm_loss` and the model; nothing else changes for a trainer or a loop.
A step of some shape is first run as it will be recorded, twice (kernels are compiled, plans made, host memory taken:
what no capture may do), and then recorded. A recorded step holds as long as the model does (`step_state.py`): adapters
switched or disabled, layers checkpointed, weights moved, dropout off, autocast changed each have steps of their own.
What cannot be recorded runs as before, and `StepGraphs.reason` says why.

Steps share one memory pool. The largest is recorded first, for a pool that has grown cannot serve a larger one: when a
larger one comes, the others are dropped and recorded anew. So they are where memory runs short.
"""

from __future__ import annotations

import logging
import weakref
from collections import Counter
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor, nn

from pyralis.engine.buckets import Bucketed, bucket_rows, to_bucket
from pyralis.engine.captured_step import CapturedStep, StaticBatch, Ticket, replayed
from pyralis.engine.recorders import Recorder, recorder_for
from pyralis.engine.step_gradients import StepGradients
from pyralis.engine.step_state import step_state
from pyralis.memory.step_store import StepStore
from pyralis.models.block import in_recorded_step, is_distributed
from pyralis.models.causal_lm import Head, LossRequest, answer_of_decoder, causal_lm_of, causal_state
from pyralis.models.detect import Reason
from pyralis.models.fast_path import LAYOUT, backbone_state
from pyralis.models.layout import READ
from pyralis.models.swap import is_fast
from pyralis.models.unpadding import can_be_removed

CudaGraph: TypeAlias = Literal["auto", "off"]

WARM_UP = 2  # steps of a shape before it is recorded
MOST_STEPS = 48  # recorded at once; more shapes than that come too seldom to be worth it
MOST_SHORTAGES = 3  # of memory, after which nothing is recorded any more
NO_MEMORY = "not enough memory to record a step of this shape"
INERT = frozenset({"input_ids", "use_cache", "return_dict", *READ})  # arguments that a recorded step deals with

logger = logging.getLogger(__name__)


def use_step_graphs(
    model: nn.Module, mode: CudaGraph = "auto", *, recorder: Recorder | None = None
) -> StepGraphs | None:
    """Record the steps of an accelerated causal LM from now on (`off`: no more); None where that cannot be.

    recorder: by default CUDA graphs, and nothing on a CPU.
    """
    causal: Any = causal_lm_of(model)
    if not is_fast(causal):
        return None
    state = causal_state(causal)
    state.engine = None
    if mode == "auto":
        recorder = recorder or recorder_for(next(causal.parameters()).device)
        state.engine = None if recorder is None else StepGraphs(recorder)
    return state.engine


@dataclass(frozen=True, eq=False)
class _Step:
    """A micro-step that can be recorded, at its bucket."""

    causal: Any
    head: Head
    batch: Bucketed
    rows: int | None  # that reach the head
    request: LossRequest

    @property
    def key(self) -> Hashable:
        return self.batch.shape, self.rows, self.request.label_smoothing, self.request.num_items is None

    def loss(self, batch: Bucketed | StaticBatch, num_items: Tensor | float | None) -> Tensor:
        inputs = {"input_ids": batch.input_ids, "position_ids": batch.positions, "use_cache": False}
        wanted = LossRequest(batch.targets, num_items, self.request.label_smoothing, self.rows)
        loss: Tensor = answer_of_decoder(self.causal, self.head, {**inputs, LAYOUT: batch.layout}, wanted).loss
        return loss

    def recorded_loss(self, static: StaticBatch) -> Tensor:
        return self.loss(static, static.num_items)


class StepGraphs:
    """Recorded steps of one model. reason: why the last call was not replayed; None if it was."""

    def __init__(self, recorder: Recorder) -> None:
        self.reason: Reason | None = None
        self.replays = 0
        self._recorder = recorder
        self._steps: dict[Hashable, CapturedStep] = {}
        self._seen: Counter[Hashable] = Counter()
        self._refused: dict[Hashable, Reason] = {}
        self._shortages = 0
        self._model_state: tuple[Any, ...] = ()
        self._pending: weakref.ref[Ticket] | None = None
        self._anchor: Tensor | None = None
        self._store = StepStore()
        self._said: set[str] = set()

    def drop(self) -> bool:
        """Forget all recorded steps and give their memory back; False if there were none. They are recorded anew."""
        had = bool(self._steps)
        self._steps.clear()
        self._recorder.renew()
        return had

    def __call__(self, causal: Any, head: Head, arguments: Mapping[str, Any], request: LossRequest) -> Tensor:
        found = self._find(causal, head, arguments, request)
        if isinstance(found, Reason):
            self._tell(found)
            return self._roomy(lambda: answer_of_decoder(causal, head, arguments, request).loss)
        step = self._steps.get(found.key)
        if step is None:
            reason = self._refused.get(found.key) or self._warms_up(found) or self._record(found)
            if reason is not None:
                self._tell(reason)
                return self._roomy(partial(self._as_recorded, found))
            step = self._steps[found.key]
        self.reason, self.replays = None, self.replays + 1
        step.weights.before_replay()
        ticket = Ticket()
        self._pending = weakref.ref(ticket)
        device = found.batch.input_ids.device
        inputs = step.gradients.parameters if is_distributed() else (self._anchor_on(device),)
        return replayed(step, found.batch, request.num_items, ticket, inputs)

    def _find(self, causal: Any, head: Head, arguments: Mapping[str, Any], request: LossRequest) -> _Step | Reason:
        if not torch.is_grad_enabled():
            return Reason("no gradient is wanted")
        odd = [name for name, value in arguments.items() if value is not None and name not in INERT]
        ids = arguments.get("input_ids")
        if odd or ids is None:
            return Reason(f"the argument {odd[0]} is not recorded" if odd else "no input_ids")
        if self._pending is not None and (ticket := self._pending()) is not None and not ticket.done:
            return Reason("the backward of another forward is still to come")
        state = step_state(causal, head)
        if isinstance(state, Reason):
            return state
        if state != self._model_state:
            self.drop()
            self._seen.clear()
            self._refused.clear()
            self._model_state = state
        removable = partial(can_be_removed, causal.model, device=ids.device)
        batch = to_bucket(ids, request.targets, arguments, removable=removable)
        if isinstance(batch, Reason):
            return batch
        rows = bucket_rows(request.supervised_rows, batch.input_ids.numel())
        return _Step(causal, head, batch, rows, request)

    def _warms_up(self, step: _Step) -> Reason | None:
        self._seen[step.key] += 1
        if self._seen[step.key] <= WARM_UP:
            return Reason("the first steps of a shape")
        if len(self._steps) >= MOST_STEPS:
            return Reason(f"{MOST_STEPS} shapes are recorded already")
        if self._shortages >= MOST_SHORTAGES:
            return Reason(f"memory ran short beside recorded steps {MOST_SHORTAGES} times")
        return None

    def _as_recorded(self, step: _Step) -> Tensor:
        own = backbone_state(step.causal.model).kept.store
        with in_recorded_step(None, self._store.reserving(own)):
            return step.loss(step.batch, step.request.num_items)

    def _roomy(self, compute: Callable[[], Tensor]) -> Tensor:
        """What `compute` returns; where memory is short, without the recorded steps' memory."""
        try:
            return compute()
        except torch.OutOfMemoryError:
            if not self.drop():
                raise
        self._shortages += 1
        logger.info("Memory ran short beside recorded training steps: they are dropped, and recorded anew.")
        return compute()

    def _record(self, step: _Step) -> Reason | None:
        """Why the step cannot be recorded; None if it was."""
        tokens = step.batch.input_ids.numel()
        if any(known.static.input_ids.numel() < tokens for known in self._steps.values()):
            self.drop()
        reason = self._try(step)
        if reason is not None and reason.text == NO_MEMORY and self.drop():  # the pool had less than the whole GPU
            reason = self._try(step)
        if reason is not None:
            self.drop()
            self._refused[step.key] = reason
        return reason

    def _try(self, step: _Step) -> Reason | None:
        weights = backbone_state(step.causal.model).kept.weights
        inside = {id(p) for p in weights.parameters}
        outer = [p for p in step.causal.parameters() if p.requires_grad and id(p) not in inside]
        gradients = StepGradients((*weights.parameters, *outer), weights.gradients)
        static = StaticBatch.like(step.batch, step.request.num_items is not None)

        cached = torch.is_autocast_cache_enabled()
        torch.set_autocast_cache_enabled(False)  # what is cast while recording lives in the pool
        try:
            made = CapturedStep(self._recorder, static, gradients, weights, step.recorded_loss, self._store)
        except RuntimeError as error:  # OutOfMemoryError is one
            weights.after_replay(failed=True)
            self._recorder.mend()
            return Reason(NO_MEMORY if _is_shortage(error) else f"it cannot be recorded: {_first_line(error)}")
        finally:
            torch.set_autocast_cache_enabled(cached)
        self._steps[step.key] = made
        return None

    def _anchor_on(self, device: torch.device) -> Tensor:
        if self._anchor is None or self._anchor.device != device:
            self._anchor = torch.zeros((), device=device, requires_grad=True)
        return self._anchor

    def _tell(self, reason: Reason) -> None:
        self.reason = reason
        text = str(reason)
        if text not in self._said and "first steps" not in text and "no gradient" not in text:
            self._said.add(text)
            logger.info("A training step is not replayed from a CUDA graph: %s.", text)


def _is_shortage(error: BaseException) -> bool:
    """Whether memory was short. Ending the capture that it broke may have raised an error of its own."""
    found: BaseException | None = error
    while found is not None and not isinstance(found, torch.OutOfMemoryError):
        found = found.__cause__ or found.__context__
    return found is not None


def _first_line(error: BaseException) -> str:
    """Of the first error: what follows from it tells less."""
    while (before := error.__cause__ or error.__context__) is not None:
        error = before
    return next(iter(str(error).splitlines()), type(error).__name__)
