"""A micro-batch that did not fit, again with more room: nothing is lost.

Recorded steps of other shapes are given up first, then a more frugal memory plan is taken; this only where a model
follows one (`memory/auto.py`): what a user has chosen by hand is not changed. And in one process, for others would wait
for parts of gradients that this one has sent already. Gradients and the random state are put back to where they were
before the micro-batch.
"""

from __future__ import annotations

import gc
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from pyralis.engine.step_graphs import StepGraphs
from pyralis.engine.surroundings import RandomState
from pyralis.memory.auto import Planner, planner_of
from pyralis.memory.explain import gib
from pyralis.memory.predict import Settings
from pyralis.models.block import is_distributed
from pyralis.models.causal_lm import causal_lm_of, causal_state
from pyralis.models.swap import is_fast
from pyralis.ops._shortage import ran_short
from pyralis.ops.adamw_8bit import State8bit
from pyralis.train.module_walk import parameters_of

logger = logging.getLogger(__name__)

Result = TypeVar("Result")
MOST_SHARE = 16  # gradients of more than this part of a GPU's memory are not copied


def retried(model: Any, step: Callable[[], Result], optimizer: Any = None, accumulation: int = 1) -> Result:
    """`step()`, a forward and backward of `model` as it is wrapped; again while it runs out of memory and there are
    recorded steps to give up, or the plan can be more frugal.

    optimizer: of all that is trained, None where it is not known. accumulation: micro-batches of its steps.

    Raises what was raised (torch.OutOfMemoryError, RuntimeError of cuBLAS or cuDNN) where it cannot, or where gradients
    accumulated so far are lost.
    """
    causal = causal_lm_of(model)
    planner, engine = planner_of(causal), _engine(causal)
    if (planner is None and engine is None) or is_distributed():
        return step()
    if planner is not None and planner.plan is None:
        planner.settings = settings_of(optimizer, accumulation)
    groups = getattr(optimizer, "param_groups", ())
    trained = [p for group in groups for p in group["params"]] or [p for p in parameters_of(causal) if p.requires_grad]
    before = Before.of(trained)
    failures = 0
    while True:
        try:
            return step()
        except RuntimeError as error:
            if not ran_short(error):
                raise
            failure = error.with_traceback(None)  # its frames hold the activations
            failure.__context__ = None
        # Outside of the `except` block, where nothing refers to the frames any more.
        if not before.restore():
            failure.add_note(
                "The gradients of this step's earlier micro-batches were too large to be copied: it is lost."
            )
            raise failure
        has_room = engine is not None and engine.make_room()
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        if not has_room:
            _go_down(planner, causal, failure, failures)
            failures += 1


def settings_of(optimizer: Any, accumulation: int) -> Settings:
    """What an optimizer tells of a run: bytes of its states per parameter, 8 bits or 32 for each of the two."""
    inner = getattr(optimizer, "optimizer", optimizer)
    in_8_bits = isinstance(getattr(inner, "moments", None), State8bit) or (
        getattr(getattr(inner, "args", None), "optim_bits", 32) == 8
    )
    return Settings(moments=2.1 if in_8_bits else 8.0, accumulation=accumulation)


def _engine(causal: nn.Module) -> StepGraphs | None:
    engine = causal_state(causal).engine if is_fast(causal) else None
    return engine if isinstance(engine, StepGraphs) else None


def _go_down(planner: Planner | None, causal: nn.Module, failure: RuntimeError, failures: int) -> None:
    planned = None if planner is None else planner.plan
    if planner is None or not planner.notch_down(causal, failures):
        raise failure
    assert planned is not None
    assert planner.plan is not None
    logger.warning(
        "Out of memory with %s planned for: the micro-batch is computed again with %s.",
        gib(planned.memory.reserved), gib(planner.plan.memory.reserved),
    )  # fmt: skip


@dataclass(frozen=True, eq=False)
class Before:
    """What a micro-batch changes: gradients and random states, as they were."""

    parameters: Sequence[Tensor]
    gradients: list[Tensor | None]
    copies: list[tuple[Tensor, Tensor]] | None  # (buffer, what it held); None: too large to be copied
    random: RandomState

    @classmethod
    def of(cls, parameters: Sequence[Tensor]) -> Before:
        device = parameters[0].device
        gradients = [p.grad for p in parameters]
        buffers = {id(b): b for g in gradients if g is not None for b in [g if g._base is None else g._base]}
        copies: list[tuple[Tensor, Tensor]] | None = []
        if buffers:
            size = sum(buffer.nbytes for buffer in buffers.values())
            fits = device.type != "cuda" or size * MOST_SHARE < torch.cuda.mem_get_info(device)[1]
            copies = [(buffer, buffer.detach().clone()) for buffer in buffers.values()] if fits else None
        return cls(parameters, gradients, copies, RandomState.now(device))

    @torch.no_grad()
    def restore(self) -> bool:
        """Whether everything could be put back."""
        if self.copies is None:
            return False
        for parameter, gradient in zip(self.parameters, self.gradients):
            parameter.grad = gradient
        for buffer, copy in self.copies:
            buffer.copy_(copy)
        self.random.restore()
        return True
