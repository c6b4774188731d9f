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
from collections.abc import Callable, Hashable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor, nn

from pyralis.engine.captured_step import CapturedStep, StaticBatch, Ticket, replayed
from pyralis.engine.recordable import RecordableStep, recordable
from pyralis.engine.recorders import Recorder, first_line, is_shortage, recorder_for
from pyralis.engine.step_gradients import StepGradients
from pyralis.engine.step_state import step_state
from pyralis.memory.step_store import StepStore
from pyralis.models.block import in_recorded_step, is_distributed
from pyralis.models.causal_lm import Head, LossRequest, answer_of_decoder, causal_lm_of, causal_state
from pyralis.models.detect import Reason
from pyralis.models.fast_path import backbone_state
from pyralis.models.swap import is_fast

CudaGraph: TypeAlias = Literal["auto", "off"]

WARM_UP = 2  # steps of a shape before it is recorded
MOST_STEPS = 48  # recorded at once; more shapes than that come too seldom to be worth it
MOST_PATIENCE = 6  # shortages of memory, each of which doubles the steps before a shape is recorded
FIRST_STEPS = Reason("the first steps of a shape")
NO_GRADIENT = Reason("no gradient is wanted")
ANOTHER = Reason("the backward of another forward is still to come")
PASSING = (FIRST_STEPS, NO_GRADIENT, ANOTHER)  # not worth a word
NO_MEMORY = Reason("not enough memory to record a step of this shape")

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


@contextmanager
def step_graphs(model: nn.Module, mode: CudaGraph = "auto") -> Iterator[StepGraphs | None]:
    """`use_step_graphs` for a while; what was chosen by hand before stays."""
    causal: Any = causal_lm_of(model)
    if not is_fast(causal) or causal_state(causal).engine is not None:
        yield None
        return
    engine = use_step_graphs(model, mode)
    try:
        yield engine
    finally:
        if engine is not None:
            use_step_graphs(model, "off")
            engine.drop()


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

    def make_room(self) -> bool:
        """Memory ran short: give that of recorded steps back, and wait longer before the next; False if there was
        none."""
        if not self.drop():
            return False
        self._shortages += 1
        self._seen.clear()
        logger.info("Memory ran short beside recorded training steps: they are dropped, and recorded anew later.")
        return True

    def __call__(self, causal: Any, head: Head, arguments: Mapping[str, Any], request: LossRequest) -> Tensor:
        def as_it_is() -> Tensor:
            loss: Tensor = answer_of_decoder(causal, head, arguments, request).loss
            return loss

        found = self._find(causal, head, arguments, request)
        if isinstance(found, Reason):
            self._tell(found)
            return self._roomy(as_it_is)
        step = self._steps.get(found.key)
        if step is None:
            reason = self._refused.get(found.key) or self._warms_up(found) or self._record(found)
            if reason is not None:
                self._tell(reason)
                return self._roomy(partial(self._as_recorded, found) if reason is FIRST_STEPS else as_it_is)
            step = self._steps[found.key]
        self.reason, self.replays = None, self.replays + 1
        step.weights.before_replay()
        ticket = Ticket()
        self._pending = weakref.ref(ticket)
        device = found.batch.input_ids.device
        inputs = step.gradients.parameters if is_distributed() else (self._anchor_on(device),)
        return replayed(step, found.batch, request.num_items, ticket, inputs)

    def _find(
        self, causal: Any, head: Head, arguments: Mapping[str, Any], request: LossRequest
    ) -> RecordableStep | Reason:
        if not torch.is_grad_enabled():
            return NO_GRADIENT
        if self._pending is not None and (ticket := self._pending()) is not None and not ticket.done:
            return ANOTHER
        state = step_state(causal, head)
        if isinstance(state, Reason):
            return state
        if state != self._model_state:
            self.drop()
            self._seen.clear()
            self._refused.clear()
            self._model_state = state
        return recordable(causal, head, arguments, request)

    def _warms_up(self, step: RecordableStep) -> Reason | None:
        self._seen[step.key] += 1
        if self._seen[step.key] <= WARM_UP << min(self._shortages, MOST_PATIENCE):
            return FIRST_STEPS
        if len(self._steps) >= MOST_STEPS:
            return Reason(f"{MOST_STEPS} shapes are recorded already")
        return None

    def _as_recorded(self, step: RecordableStep) -> Tensor:
        own = backbone_state(step.causal.model).kept.store
        with in_recorded_step(None, self._store.reserving(own)):
            return step.loss(step.batch, step.request.num_items)

    def _roomy(self, compute: Callable[[], Tensor]) -> Tensor:
        """What `compute` returns; where memory is short, without the recorded steps' memory."""
        try:
            return compute()
        except torch.OutOfMemoryError:
            if not self.make_room():
                raise
        return compute()

    def _record(self, step: RecordableStep) -> Reason | None:
        """Why the step cannot be recorded; None if it was."""
        tokens = step.batch.input_ids.numel()
        if any(known.static.input_ids.numel() < tokens for known in self._steps.values()):
            self.drop()
        reason = self._try(step)
        if reason == NO_MEMORY and self.drop():  # the pool had less than the whole GPU
            reason = self._try(step)
        if reason is not None:
            self.drop()
            self._refused[step.key] = reason
        return reason

    def _try(self, step: RecordableStep) -> Reason | None:
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
            return NO_MEMORY if is_shortage(error) else Reason(f"it cannot be recorded: {first_line(error)}")
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
        if reason not in PASSING and reason.text not in self._said:
            self._said.add(reason.text)
            logger.warning("Training steps run without CUDA graphs: %s.", reason)
