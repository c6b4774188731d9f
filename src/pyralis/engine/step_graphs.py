"""The training loss of a fast causal LM from recorded steps: on a GPU, one launch for a forward and one for a backward.

`use_step_graphs(model)` puts it between `causal_lm_loss` and the model; nothing else changes for a trainer or a loop.
A step of some shape is first run as it is, twice (kernels are compiled, plans made: what no capture may do), and then
recorded. A recorded step holds as long as the model does: adapters switched or disabled, layers checkpointed, weights
moved, dropout off, autocast changed each have steps of their own. What cannot be recorded runs as before, and
`StepGraphs.reason` says why.

Steps share one memory pool. The largest is recorded first, for a pool that has grown cannot serve a larger one: when a
larger one comes, the others are dropped and recorded anew.
"""

from __future__ import annotations

import logging
import weakref
from collections import Counter
from collections.abc import Hashable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from pyralis.engine.buckets import Bucketed, to_bucket
from pyralis.engine.captured_step import CapturedStep, CudaGraphs, Recorder, StaticBatch, StepGradients
from pyralis.models.block import is_distributed
from pyralis.models.causal_lm import Head, LossRequest, answer_of_decoder, causal_lm_of, causal_state
from pyralis.models.checkpointing import save_policy
from pyralis.models.detect import Reason
from pyralis.models.fast_path import LAYOUT, backbone_state, prepare_layers
from pyralis.models.layer_state import HOOKS
from pyralis.models.layout import READ
from pyralis.models.swap import is_fast
from pyralis.models.unpadding import can_be_removed
from pyralis.ops._head import bucket

CudaGraph: TypeAlias = Literal["auto", "off"]

WARM_UP = 2  # steps of a shape before it is recorded
MOST_STEPS = 48  # recorded at once; more shapes than that come too seldom to be worth it
INERT = frozenset({"input_ids", "use_cache", "return_dict", *READ})  # arguments that a recorded step deals with
OUTER_HOOKS = ("NEFTune", "neftune", "make_inputs_require_grad", "_require_grads_hook")

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
        device = next(causal.parameters()).device
        if recorder is None and device.type == "cuda":
            recorder = CudaGraphs(device)
        state.engine = None if recorder is None else StepGraphs(recorder)
    return state.engine


@dataclass(eq=False)
class _Ticket:
    """A forward whose backward may come."""

    done: bool = False


class StepGraphs:
    """Recorded steps of one model. reason: why the last call was not replayed; None if it was."""

    def __init__(self, recorder: Recorder) -> None:
        self.reason: Reason | None = None
        self.replays = 0
        self._recorder = recorder
        self._steps: dict[Hashable, CapturedStep] = {}
        self._seen: Counter[Hashable] = Counter()
        self._refused: dict[Hashable, Reason] = {}
        self._model_state: tuple[Any, ...] = ()
        self._pending: weakref.ref[_Ticket] | None = None
        self._anchor: Tensor | None = None
        self._said: set[str] = set()

    def drop(self) -> None:
        """Forget all recorded steps and give their memory back."""
        self._steps.clear()
        self._recorder.renew()

    def __call__(self, causal: Any, head: Head, arguments: Mapping[str, Any], request: LossRequest) -> Tensor:
        step = self._find(causal, head, arguments, request)
        if isinstance(step, Reason):
            self._tell(step)
            loss: Tensor = answer_of_decoder(causal, head, arguments, request).loss
            return loss
        captured, batch = step
        self.reason, self.replays = None, self.replays + 1
        captured.weights.before_replay()
        ticket = _Ticket()
        self._pending = weakref.ref(ticket)
        inputs = captured.gradients.parameters if is_distributed() else (self._anchor_on(batch.input_ids.device),)
        return _Replayed.apply(captured, batch, request.num_items, ticket, *inputs)  # type: ignore[no-any-return]

    def _find(
        self, causal: Any, head: Head, arguments: Mapping[str, Any], request: LossRequest
    ) -> tuple[CapturedStep, Bucketed] | Reason:
        if not torch.is_grad_enabled():
            return Reason("no gradient is wanted")
        odd = [name for name, value in arguments.items() if value is not None and name not in INERT]
        ids = arguments.get("input_ids")
        if odd or ids is None:
            return Reason(f"the argument {odd[0]} is not recorded" if odd else "no input_ids")
        if self._pending is not None and (ticket := self._pending()) is not None and not ticket.done:
            return Reason("the backward of another forward is still to come")
        state = _model_state(causal, head)
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
        rows = None if request.supervised_rows is None else bucket(request.supervised_rows)
        key = (batch.shape, rows, request.label_smoothing, request.num_items is None)
        if (refused := self._refused.get(key)) is not None:
            return refused
        step = self._steps.get(key)
        if step is None:
            self._seen[key] += 1
            if self._seen[key] <= WARM_UP:
                return Reason("the first steps of a shape")
            if len(self._steps) >= MOST_STEPS:
                return Reason(f"{MOST_STEPS} shapes are recorded already")
            made = self._record(causal, head, batch, rows, request)
            if isinstance(made, Reason):
                self._refused[key] = made
                return made
            step = self._steps[key] = made
        return step, batch

    def _record(
        self, causal: Any, head: Head, batch: Bucketed, rows: int | None, request: LossRequest
    ) -> CapturedStep | Reason:
        tokens = batch.input_ids.numel()
        if any(step.static.input_ids.numel() < tokens for step in self._steps.values()):
            self.drop()
        prepared = backbone_state(causal.model).kept.weights
        inside = {id(p) for p in prepared.parameters}
        outer = [p for p in causal.parameters() if p.requires_grad and id(p) not in inside]
        gradients = StepGradients((*prepared.parameters, *outer), prepared.gradients)
        static = StaticBatch.like(batch, request.num_items is not None)

        def compute(static: StaticBatch) -> Tensor:
            inputs = {"input_ids": static.input_ids, "position_ids": static.positions, "use_cache": False}
            wanted = LossRequest(static.targets, static.num_items, request.label_smoothing, rows)
            loss: Tensor = answer_of_decoder(causal, head, {**inputs, LAYOUT: static.layout}, wanted).loss
            return loss

        cached = torch.is_autocast_cache_enabled()
        torch.set_autocast_cache_enabled(False)  # what is cast while recording lives in the pool
        try:
            return CapturedStep(self._recorder, static, gradients, prepared, compute)
        except torch.OutOfMemoryError:
            prepared.after_replay(failed=True)
            self.drop()
            return Reason("not enough memory to record a step of this shape")
        except RuntimeError as error:
            prepared.after_replay(failed=True)
            self.drop()
            self._recorder.mend()
            return Reason(f"it cannot be recorded: {str(error).splitlines()[0]}")
        finally:
            torch.set_autocast_cache_enabled(cached)

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


class _Replayed(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, step: CapturedStep, batch: Bucketed, num_items: Tensor | float | None, ticket: _Ticket, *_: Tensor
    ) -> Tensor:
        ctx.step, ctx.ticket = step, ticket
        return step.forward(batch, num_items)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[None, ...]:
        if ctx.ticket.done:
            raise RuntimeError(
                "a recorded step was asked for its gradient a second time; the first has overwritten its activations. "
                'Call backward once for each forward, or `use_step_graphs(model, "off")`.'
            )
        ctx.ticket.done = True
        ctx.step.backward(grad)
        return (None,) * len(ctx.needs_input_grad)


def _model_state(causal: Any, head: Head) -> tuple[Any, ...] | Reason:
    """What recorded steps are fixed to."""
    backbone = causal.model
    if not is_fast(backbone):
        return Reason("the decoder is not accelerated")
    outside = [module for name, module in backbone._modules.items() if name != "layers"]
    for module in (backbone, *outside, causal.lm_head):
        if (hook := _odd_hook(module)) is not None:
            return Reason(f"{type(module).__name__} has a hook, {hook}, which a recorded step would not call")
    policies = tuple(save_policy(layer) for layer in backbone.layers)
    if "offload_input" in policies:
        return Reason("layer inputs are offloaded")
    prepared = prepare_layers(backbone, backbone_state(backbone))
    if len(prepared) != len(backbone.layers):
        return Reason("not all layers are fast")
    weights = [p for module in (*outside, causal.lm_head) for p in module.parameters()]
    kind = weights[0].device.type
    return (
        *(layer.state for layer in backbone_state(backbone).kept.weights.layers),
        *((p.data_ptr(), p.requires_grad) for p in weights), head.weight.data_ptr(),
        policies, causal.training,
        torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind),
    )  # fmt: skip


def _odd_hook(module: nn.Module) -> str | None:
    """The first hook that is not known to be at home in a recorded step."""
    for kind in HOOKS:
        for hook in vars(module)[kind].values():
            name = getattr(hook, "__qualname__", type(hook).__qualname__)
            if not any(known in name for known in OUTER_HOOKS):
                return name
    return None


__all__ = ["CudaGraph", "StepGraphs", "use_step_graphs"]
