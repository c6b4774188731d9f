"""The training loss of a fast causal LM from recorded steps: on a GPU, one launch for a forward and one for a backward.

`use_step_graphs(model)` puts it between `causal_lm_loss` and the model; nothing else changes for a trainer or a loop.
A step of some shape is first run as it will be recorded, twice (kernels are compiled, plans made, host memory taken:
what no capture may do), and then recorded. A recorded step holds as long as the model does (`step_state.py`): adapters
switched or disabled, layers checkpointed, weights moved, dropout off, autocast changed each have steps of their own.
What cannot be recorded runs as before, and `StepGraphs.reason` says why.

Before its first replay a recorded step is held against the same micro-batch run (`proof.py`). Where they differ, or a
replay fails, there are no recorded steps any more, and training goes on without.

Steps share one memory pool. The largest is recorded first, for a pool that has grown cannot serve a larger one: when a
larger one comes, the others are dropped and recorded anew. So they are where memory runs short.
"""

from __future__ import annotations

import logging
import weakref
from collections.abc import Callable, Hashable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor, nn

from pyralis.engine.captured_step import Replay, replayed
from pyralis.engine.patience import Patience
from pyralis.engine.proof import Proof, gradients_of
from pyralis.engine.recordable import RecordableStep, recordable
from pyralis.engine.recorded_steps import RecordedSteps
from pyralis.engine.recorders import Recorder, first_line, mended, recorder_for
from pyralis.engine.shortage import is_shortage
from pyralis.engine.step_check import Checked, summary_of
from pyralis.engine.step_state import step_state
from pyralis.engine.surroundings import Surroundings
from pyralis.models.block import is_distributed
from pyralis.models.causal_lm import Head, LossRequest, answer_of_decoder, causal_lm_of, causal_state
from pyralis.models.detect import Reason
from pyralis.models.swap import is_fast
from pyralis.ops._shortage import ran_short

CudaGraph: TypeAlias = Literal["auto", "off"]

WARM_UP = 2  # steps of a shape before it is recorded
MOST_STEPS = 48  # recorded at once; more shapes than that come too seldom to be worth it
FIRST_STEPS = Reason("the first steps of a shape")
NO_GRADIENT = Reason("no gradient is wanted")
ANOTHER = Reason("the backward of another forward is still to come")
ACCUMULATED = Reason("gradients accumulated so far are too large to be kept aside while a step is checked")
PASSING = (FIRST_STEPS, NO_GRADIENT, ANOTHER, ACCUMULATED)  # not worth a word
NO_MEMORY = Reason("not enough memory to record a step of this shape")

logger = logging.getLogger(__name__)


def use_step_graphs(
    model: nn.Module, mode: CudaGraph = "auto", *, recorder: Recorder | None = None
) -> StepGraphs | None:
    """Record the steps of an accelerated causal LM from now on (`off`: no more); None where that cannot be. Those that
    were recorded before are forgotten, and give their memory back.

    recorder: by default CUDA graphs, and nothing on a CPU.
    """
    causal: Any = causal_lm_of(model)
    if not is_fast(causal):
        return None
    state = causal_state(causal)
    if state.engine is not None:
        state.engine.drop()
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
    """Recorded steps of one model.

    reason: why the last call was not replayed; None if it was. checks: of each recorded step, in turn.
    """

    def __init__(self, recorder: Recorder) -> None:
        self.reason: Reason | None = None
        self.replays = 0
        self.checks: list[Checked] = []
        self._steps = RecordedSteps(recorder)
        self._patience = Patience(WARM_UP)
        self._refused: dict[Hashable, Reason] = {}
        self._over: Reason | None = None  # why nothing is recorded any more
        self._model_state: tuple[Any, ...] = ()
        self._pending: weakref.ref[Replay] | None = None
        self._said: set[str] = set()

    @property
    def summary(self) -> str | None:
        """What became of recorded steps, as a line of a report; None if there were none."""
        return summary_of(self.checks, self.replays, self._over) if self.checks else None

    def drop(self) -> bool:
        """Forget all recorded steps and give their memory back; False if there were none. They are recorded anew."""
        return self._steps.drop()

    def make_room(self) -> bool:
        """Memory ran short: give that of recorded steps back, and wait longer before the next; False: there is none."""
        if had := self.drop():
            self._wait_longer()
        return had

    def _wait_longer(self) -> None:
        self._patience.wait_longer()
        logger.info("Memory ran short beside recorded training steps: they are dropped, and recorded anew later.")

    def __call__(self, causal: Any, head: Head, arguments: Mapping[str, Any], request: LossRequest) -> Tensor:
        def as_it_is() -> Tensor:
            loss: Tensor = answer_of_decoder(causal, head, arguments, request).loss
            return loss

        found = self._find(causal, head, arguments, request)
        if isinstance(found, Reason):
            self._tell(found)
            return self._roomy(as_it_is)
        if found.key not in self._steps:
            reason = self._refused.get(found.key) or self._waits(found) or self._record(found, as_it_is)
            if reason is not None:
                self._tell(reason)
                return self._roomy(partial(self._steps.run, found) if reason is FIRST_STEPS else as_it_is)
        loss = self._replay(found)
        return self._roomy(as_it_is) if loss is None else loss

    def _replay(self, found: RecordableStep) -> Tensor | None:
        """The loss from the recorded step; None if that has failed, with all as it was before."""
        before = Surroundings.now(found.device)
        step = self._steps[found.key]
        inputs = step.gradients.parameters if is_distributed() else (self._steps.anchor(found.device),)
        use = Replay(step, found.batch, found.request.num_items, partial(self._recover, found, before))
        self._pending = weakref.ref(use)
        try:
            loss = replayed(use, inputs)
        except Exception as error:  # whatever it was, the loss can be computed without the graph
            failure = error.with_traceback(None)  # its frames hold the step
            del use, step
        else:
            self.reason, self.replays = None, self.replays + 1
            return loss
        self._failed(failure)
        before.random.restore()
        return None

    def _recover(self, found: RecordableStep, before: Surroundings, error: Exception, grad: Tensor) -> None:
        """The recorded backward has failed: its gradient from a forward and a backward that are run."""
        self._failed(error)
        with before.again():
            loss = self._steps.run(found, anchored=True)
        loss.backward(grad.to(loss.dtype))

    def _failed(self, error: Exception) -> None:
        """A replay has failed: for want of memory, which is made, or there are no more recorded steps."""
        self._steps.clear()  # before the device is asked for anything
        mended(self._steps.recorder, error)
        self.drop()
        if is_shortage(error):
            self._wait_longer()
            self.reason = FIRST_STEPS
        else:
            self._over = Reason(f"a recorded step cannot be replayed: {first_line(error)}")
            self._tell(self._over)

    def _find(self, causal: Any, head: Head, arguments: Any, request: LossRequest) -> RecordableStep | Reason:
        if not torch.is_grad_enabled():
            return NO_GRADIENT
        if self._over is not None:
            return self._over
        if self._pending is not None and (use := self._pending()) is not None and not use.done:
            return ANOTHER
        state = step_state(causal, head)
        if isinstance(state, Reason):
            return state
        if state != self._model_state:
            self.drop()
            self._patience.start_anew()
            self._refused.clear()
            self._model_state = state
        return recordable(causal, head, arguments, request)

    def _waits(self, step: RecordableStep) -> Reason | None:
        if self._patience.waits(step.key):
            return FIRST_STEPS
        return Reason(f"{MOST_STEPS} shapes are recorded already") if len(self._steps) >= MOST_STEPS else None

    def _roomy(self, compute: Callable[[], Tensor]) -> Tensor:
        """What `compute` returns; where memory is short, without the recorded steps' memory."""
        try:
            return compute()
        except RuntimeError as error:
            if not (ran_short(error) and self.make_room()):
                raise
        return compute()

    def _record(self, step: RecordableStep, as_it_is: Callable[[], Tensor]) -> Reason | None:
        """Why the step cannot be recorded; None if it was, and does what it does when it is run."""
        if not gradients_of(step).can_be_kept_aside():
            return ACCUMULATED
        try:
            proof = self._steps.prove(step, as_it_is)
        except RuntimeError as error:
            if not (ran_short(error) and self.make_room()):
                raise
            return FIRST_STEPS
        if not proof.run.tells():  # of a batch in which nothing is learnt, say; another one will
            self._patience.start_anew(step.key)
            return FIRST_STEPS
        if self._steps.has_smaller_than(step):
            self.drop()
        reason = self._try(proof)
        if reason == NO_MEMORY and self.drop():  # the pool had less than the whole GPU
            reason = self._try(proof)
        if reason is not None:
            self.drop()
            self._refused[step.key] = reason
        return reason

    def _try(self, proof: Proof) -> Reason | None:
        found = self._steps.record(proof)
        if isinstance(found, Exception):
            return NO_MEMORY if is_shortage(found) else Reason(f"it cannot be recorded: {first_line(found)}")
        self.checks.append(found)
        if found.fault is not None:
            self._over = Reason(f"a recorded step is not what it is when it is run: {found.fault}")
        elif len(self.checks) == 1:
            logger.info("Recorded training steps are checked: %s.", found)
        return self._over

    def _tell(self, reason: Reason) -> None:
        self.reason = reason
        if reason not in PASSING and reason.text not in self._said:
            self._said.add(reason.text)
            logger.warning("Training steps run without CUDA graphs: %s.", reason)
