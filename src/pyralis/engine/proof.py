"""A micro-step recorded, and held against what it came to when it was run (`step_check.py`)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from pyralis.engine.captured_step import CapturedStep, StaticBatch
from pyralis.engine.recordable import RecordableStep
from pyralis.engine.recorders import Recorder, no_collection
from pyralis.engine.step_check import Checked, Measured, compared, measured
from pyralis.engine.step_gradients import StepGradients
from pyralis.engine.surroundings import Surroundings
from pyralis.memory.step_store import StepStore
from pyralis.models.fast_path import backbone_state
from pyralis.models.model_weights import ModelWeights


@dataclass(frozen=True, eq=False)
class Proof:
    """A micro-step as it was run, before it is recorded. Its activations are gone by the time that a pool is taken."""

    step: RecordableStep
    gradients: StepGradients
    before: Surroundings
    run: Measured
    plain: Tensor | None  # the loss of the batch as it came; None where dropout's masks would be other ones
    upstream: Tensor | None  # the gradient of the loss; None: 1

    @classmethod
    def of(
        cls, step: RecordableStep, at_bucket: Callable[[], Tensor], as_it_is: Callable[[], Tensor],
        upstream: Tensor | None = None,
    ) -> Proof:  # fmt: skip
        """at_bucket, as_it_is: forwards of the step, with its padding and as the batch came. Nothing is left behind:
        gradients accumulated so far and random states stay. Raises what a forward or a backward raises."""
        gradients, before = gradients_of(step), Surroundings.now(step.device)
        with before.again() as random, torch.no_grad():
            loss = as_it_is()
            plain = None if random.has_moved() else loss

        def run() -> Tensor:
            with before.again():
                loss = at_bucket()
            with torch.autocast(loss.device.type, enabled=False):  # which trainers have left by then
                loss.backward(_gradient(loss, upstream))
            return loss

        return cls(step, gradients, before, measured(gradients, run), plain, upstream)

    @property
    def weights(self) -> ModelWeights:
        found: ModelWeights = backbone_state(self.step.causal.model).kept.weights
        return found

    def record(self, recorder: Recorder, store: StepStore) -> tuple[CapturedStep, Checked]:
        """The step recorded, and how far its first replay is from what was run. Raises whatever goes wrong."""
        step = self.step
        static = StaticBatch.like(step.batch, step.request.num_items is not None)
        with self.before.again(), no_collection(), _no_autocast_cache():
            made = CapturedStep(recorder, static, self.gradients, self.weights, step.recorded_loss, store)

        def replay() -> Tensor:
            with self.before.again():
                loss = made.forward(step.batch, step.request.num_items)
                made.backward(_gradient(loss, self.upstream))
            return loss

        names = {id(p): name for name, p in step.causal.named_parameters()}
        replayed, parameters = measured(self.gradients, replay), self.gradients.parameters
        return made, compared(self.run, replayed, self.plain, parameters, names, self._dtype)

    @property
    def _dtype(self) -> torch.dtype:
        """Of products."""
        return self.before.dtype if self.before.autocast else self.weights.layers[0].state.dtype


def gradients_of(step: RecordableStep) -> StepGradients:
    """Those of everything that is trained in the causal LM, inside fused layers and outside."""
    weights: ModelWeights = backbone_state(step.causal.model).kept.weights
    inside = {id(p) for p in weights.parameters}
    outer = [p for p in step.causal.parameters() if p.requires_grad and id(p) not in inside]
    return StepGradients((*weights.parameters, *outer), weights.gradients)


def _gradient(loss: Tensor, upstream: Tensor | None) -> Tensor:
    return torch.ones_like(loss) if upstream is None else upstream.to(loss)


@contextmanager
def _no_autocast_cache() -> Iterator[None]:
    """What is cast while a step is recorded lives in the pool."""
    cached = torch.is_autocast_cache_enabled()
    torch.set_autocast_cache_enabled(False)
    try:
        yield
    finally:
        torch.set_autocast_cache_enabled(cached)
