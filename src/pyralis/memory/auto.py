"""`use_gradient_checkpointing="auto"`: a model follows the memory plan of its batches.

`follow_plan(causal)` leaves a `Planner` with a fast causal LM. Its forward asks the planner first (`before_call`),
which plans when the first batch to be trained on comes, and again when a larger one does, for the memory that is free
at that moment. Without a GPU nothing is planned and everything is kept. Before the first plan, and where there can be
none, layers are computed again from their input.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn

from pyralis.errors import ModelError
from pyralis.memory.calibrate import device_rates
from pyralis.memory.cost import Batch
from pyralis.memory.explain import summary
from pyralis.memory.footprint import standing_bytes
from pyralis.memory.gpus import GpuRates
from pyralis.memory.plan import Plan, plan
from pyralis.memory.predict import Settings
from pyralis.memory.shape import ModelShape, describe_model
from pyralis.models.checkpointing import plan_save_policy
from pyralis.models.layout import LENGTHS
from pyralis.models.residency import choose_residency
from pyralis.ops._triton import gpu_of

logger = logging.getLogger(__name__)

PLANNER = "_pyralis_planner"
MARGIN_BYTES, MARGIN_SHARE = 256 << 20, 0.01  # of the device's memory that are left alone
LOGIT_BYTES = 14  # of a logit that stock makes and learns from: half precision, three times float32
REMOVED = 0.8  # padding is taken for removed below this share of real tokens


@dataclass(frozen=True, slots=True)
class Device:
    """A GPU as planning sees it: rates, and bytes that this process could have and that it has."""

    rates: GpuRates
    usable: int
    allocated: int


def margin(total: int) -> int:
    """Bytes of a device's memory that no plan takes."""
    return max(MARGIN_BYTES, int(MARGIN_SHARE * total))


def look_at(device: torch.device) -> Device | None:
    """What is free now and what the allocator holds; None without a GPU."""
    if device.type != "cuda":
        return None
    free, total = torch.cuda.mem_get_info(device)
    usable = free + torch.cuda.memory_reserved(device) - margin(total)
    return Device(device_rates(device), usable, torch.cuda.memory_allocated(device))


@dataclass(eq=False)
class Planner:
    """settings: what trainers know of the optimizer and of recording. plan: the one that is followed.

    reason: why there is none, where there should be one.
    """

    look: Callable[[torch.device], Device | None] = look_at
    settings: Settings = field(default_factory=Settings)
    plan: Plan | None = None
    reason: str | None = None
    limit: int | None = None  # bytes; lowered when they were not there after all
    _logits: int = 0  # bytes of logits for each entry of the vocabulary

    def before_call(self, causal: Any, arguments: Mapping[str, Any], *, recorded: bool, logits: bool) -> None:
        """arguments: of the causal LM's forward. recorded: whether steps are. logits: whether all are stored."""
        if not (torch.is_grad_enabled() and causal.training) or self.reason is not None:
            return
        batch = _batch(arguments)
        if batch is None or (self.plan is not None and batch.tokens <= self.plan.batch.tokens):
            return
        self._logits = batch.tokens * LOGIT_BYTES if logits else 0
        self.settings = replace(self.settings, recorded=recorded)
        if (made := self._made(causal, batch, self.limit)) is not None:
            self._follow(causal, made)

    def foresee(self, causal: Any, batch: Batch, settings: Settings) -> tuple[Plan | None, str | None]:
        """(the plan that such a batch would get now, why there is none). Nothing follows it."""
        before = self.settings, self.reason
        self.settings = settings
        try:
            return self._made(causal, batch, self.limit), self.reason
        finally:
            self.settings, self.reason = before

    def notch_down(self, causal: Any, failures: int = 0) -> bool:
        """Plan for less memory than was planned with; False where that is the least already.

        failures: of the same micro-batch before this one; each doubles what is given up.
        """
        before = self.plan
        if before is None or (frugal := self._made(causal, before.batch, 0)) is None:
            return False
        most, least = before.memory.reserved, frugal.memory.reserved
        for share in (2.0**power for power in range(failures - 3, 1)):
            limit = int(most - share * (most - least))
            made = self._made(causal, before.batch, limit) or frugal
            if _choice(made) != _choice(before):
                break
        else:
            made, limit = frugal, least  # no less by prediction, but less it is
        if _choice(made) == _choice(before):
            return False
        self.limit = limit
        self._follow(causal, made)
        return True

    def _made(self, causal: Any, batch: Batch, limit: int | None) -> Plan | None:
        """The plan for a batch in what is free, and in at most `limit` bytes; None where there can be none."""
        device = next(causal.parameters()).device
        seen = self.look(device)
        if seen is None:
            return None
        try:
            shape = describe_model(causal, causal.model.layers, gpu_of(device), autocast=autocast_on(device))
        except ModelError as error:
            self.reason = str(error)
            logger.info("There is no memory plan, layers are computed again from their input: %s.", error)
            return None
        budget = seen.usable - _foreign(shape, self.plan, seen.allocated, self.settings)
        budget -= self._logits * shape.vocabulary
        return plan(shape, batch, budget if limit is None else min(budget, limit), seen.rates, self.settings)

    def _follow(self, causal: Any, made: Plan) -> None:
        self.plan = made
        for layer, policy, resident in zip(causal.model.layers, made.policies, made.keep_matrices):
            plan_save_policy(layer, policy, made.tile)
            choose_residency([layer], "kept" if resident else "in turn" if made.in_turn else "at once")
        logger.info("%s", summary(made))


def follow_plan(causal: nn.Module, planner: Planner | None = None) -> Planner:
    """Let a causal LM and its layers follow a plan from now on. planner: by default a new one."""
    forget_plan(causal)
    made = vars(causal)[PLANNER] = Planner() if planner is None else planner
    seen = made.look(next(causal.parameters()).device)
    for layer in _layers(causal):
        plan_save_policy(layer, "keep" if seen is None else "recompute_layer")
    return made


def forget_plan(causal: nn.Module) -> None:
    """Go back to what was chosen by hand."""
    if vars(causal).pop(PLANNER, None) is not None:
        for layer in _layers(causal):
            plan_save_policy(layer, None)
        choose_residency(_layers(causal), "at once")


def planner_of(causal: nn.Module) -> Planner | None:
    return vars(causal).get(PLANNER)


def chunk_of(causal: nn.Module) -> int | None:
    """Most bytes of logits at a time; None: the op's own choice."""
    planner = planner_of(causal)
    return None if planner is None or planner.plan is None else planner.plan.chunk_bytes


def _layers(causal: Any) -> Any:
    return getattr(getattr(causal, "model", None), "layers", ())


def _choice(plan: Plan) -> tuple[Any, ...]:
    return plan.policies, plan.keep_matrices, plan.chunk_bytes, plan.tile, plan.in_turn


def autocast_on(device: torch.device) -> torch.dtype | None:
    """Its dtype; None where it is off."""
    return torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else None


def _foreign(shape: ModelShape, now: Plan | None, allocated: int, settings: Settings) -> int:
    """Bytes of this process that are nothing of a step: another model's, say."""
    resident = (False,) * len(shape.layers) if now is None else now.keep_matrices
    in_turn = now is not None and now.in_turn
    return max(0, allocated - standing_bytes(shape, resident, settings.moments, in_turn=in_turn).total)


def _batch(arguments: Mapping[str, Any]) -> Batch | None:
    """Its tokens, rounded up to one of eight sizes an octave, so that batches that grow slowly are not each planned
    for; without the padding that is left out (`unpadding.py`), where the host knows how much that is."""
    ids = arguments.get("input_ids")
    ids = arguments.get("inputs_embeds") if ids is None else ids
    if ids is None or ids.dim() < 2:
        return None
    rows, length = ids.shape[:2]
    tokens = rows * length
    lengths = arguments.get(LENGTHS)
    if lengths is not None and (real := int(sum(map(int, lengths)))) < REMOVED * tokens:
        tokens = real
    grain = max(1 << max(tokens.bit_length() - 4, 0), 1)
    return Batch(1, -(-tokens // grain) * grain, document=length)
