"""The recorded steps of one model, which share one memory pool."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from functools import partial

import torch
from torch import Tensor

from pyralis.engine.captured_step import CapturedStep
from pyralis.engine.proof import Proof
from pyralis.engine.recordable import RecordableStep
from pyralis.engine.recorders import Recorder, mended
from pyralis.engine.step_check import Checked
from pyralis.memory.step_store import StepStore
from pyralis.models.block import in_recorded_step
from pyralis.models.fast_path import backbone_state


class Upstream:
    """The gradient that a loss was last given: its scale, which float16 needs, and the share of a micro-batch. An
    object of its own, so that a loss that somebody keeps keeps nothing else."""

    def __init__(self) -> None:
        self.last: Tensor | None = None

    def note(self, grad: Tensor) -> None:
        self.last = grad.detach()


class RecordedSteps(dict[Hashable, CapturedStep]):
    """By their keys. store: where inputs of layers wait that are offloaded."""

    def __init__(self, recorder: Recorder) -> None:
        super().__init__()
        self.recorder, self.store = recorder, StepStore()
        self.upstream = Upstream()
        self._anchor: Tensor | None = None

    def drop(self) -> bool:
        """Forget all and give their memory back; False if there were none."""
        if had := bool(self):
            self.recorder.wait()  # host memory that a replay still copies to would be handed out again
        self.clear()
        self.recorder.renew()
        return had

    def run(self, step: RecordableStep, *, anchored: bool = False) -> Tensor:
        """The loss of a step run as it will be recorded. anchored: out of sight of autograd's hooks on parameters."""
        own = backbone_state(step.causal.model).kept.store
        with in_recorded_step(self.anchor(step.device) if anchored else None, self.store.reserving(own)):
            loss = step.loss(step.batch, step.request.num_items)
        if not anchored and loss.requires_grad:
            loss.register_hook(self.upstream.note)
        return loss

    def anchor(self, device: torch.device) -> Tensor:
        """A leaf that requires a gradient, and gets none."""
        if self._anchor is None or self._anchor.device != device:
            self._anchor = torch.zeros((), device=device, requires_grad=True)
        return self._anchor

    def prove(self, step: RecordableStep, as_it_is: Callable[[], Tensor]) -> Proof:
        """What the step comes to when it is run; as_it_is: its forward without a bucket's padding. Raises what that
        raises."""
        return Proof.of(step, partial(self.run, step, anchored=True), as_it_is, self.upstream.last)

    def has_smaller_than(self, step: RecordableStep) -> bool:
        tokens = step.batch.input_ids.numel()
        return any(known.static.input_ids.numel() < tokens for known in self.values())

    def record(self, proof: Proof) -> Checked | Exception:
        """How far the recorded step is from the one that was run; it is kept if that is no fault. Or what went wrong,
        with nothing of it left behind.

        Raises DeviceError where the device does nothing any more.
        """
        try:
            made, checked = proof.record(self.recorder, self.store)
        except Exception as error:  # whatever it was, training can go on without
            failure = error.with_traceback(None)  # its frames hold memory
        except BaseException:
            proof.weights.after_replay(failed=True)
            self.recorder.mend()
            raise
        else:
            if checked.fault is None:
                self[proof.step.key] = made
            return checked
        proof.weights.after_replay(failed=True)
        mended(self.recorder, failure)
        return failure
