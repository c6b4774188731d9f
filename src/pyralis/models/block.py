"""The fused decoder layer: one autograd node for every family, LoRA and 4-bit weights included.

`fused_layer` computes what stock transformers with PEFT computes for a layer that a `LayerSpec` describes. Where the
gradients of trained parameters are awaited (`_leaves`), the node takes them as inputs and returns None for them: their
gradients have been written to `p.grad` by then (`gradients.py`). So `loss.backward()` works, `torch.autograd.grad` with
respect to these parameters does not.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from pyralis.models.block_backward import block_backward
from pyralis.models.block_forward import block_forward, kept
from pyralis.models.block_parts import Activations, Context
from pyralis.models.block_tiles import tile_for
from pyralis.models.gradients import FlatGradients
from pyralis.models.policy import RECOMPUTING, InputStore, SavePolicy
from pyralis.models.weights import LayerWeights
from pyralis.ops.attention import AttentionLayout

_NOTHING = nullcontext()


class _Recorded(NamedTuple):
    """What a step that is recorded puts in the place of a usual one's."""

    anchor: Tensor | None = None
    store: InputStore | None = None


_USUAL = _Recorded()
_recorded: ContextVar[_Recorded] = ContextVar("recorded", default=_USUAL)


class _Call(NamedTuple):
    """The arguments of a forward that are no tensors to autograd."""

    weights: LayerWeights
    context: Context
    layout: AttentionLayout
    flat: FlatGradients
    policy: SavePolicy
    store: InputStore | None


def fused_layer(
    hidden_states: Tensor,
    cos: Tensor,
    sin: Tensor,
    layout: AttentionLayout,
    weights: LayerWeights,
    gradients: FlatGradients | None = None,
    *,
    policy: SavePolicy = "keep",
    tile: int | None = None,
    rng: Tensor | None = None,
    store: InputStore | None = None,
) -> Tensor:
    """The layer's output, as `hidden_states` [B, S, H] in shape and dtype.

    cos, sin: [B or 1, S, rotary_dim], as the model's rotary embedding gives them. layout: how the B * S tokens form
    sequences. weights: refreshed since parameters or adapters last changed. gradients: the model's flat buffer; None
    gives each parameter a gradient of its own. rng: [seed, draw] of LoRA's dropout, unchanged until the backward is
    done; None switches dropout off. store: for "offload_input". tile: tokens that the MLP takes at a time under
    policies that recompute and without dropout in it (`block_tiles.py`); None: all.
    """
    state = weights.state
    flat = FlatGradients(()) if gradients is None else gradients
    if rng is not None and rng.device != hidden_states.device:
        rng = rng.to(hidden_states.device)  # a model over several devices
    cos, sin = (table.reshape(-1, table.shape[-1]) for table in (cos, sin))
    store = _recorded.get().store or store
    context = Context(weights.spec, state, cos, sin, rng)
    call = _Call(weights, context, layout, flat, policy, store)
    if torch.is_grad_enabled() and (hidden_states.requires_grad or state.parameters):
        context.spends = policy in RECOMPUTING
        context.tile = tile_for(context, policy, tile, hidden_states.numel() // hidden_states.shape[-1])
        return _FusedLayer.apply(hidden_states, call, *_leaves(hidden_states, state.parameters))
    context.spends = True
    with torch.no_grad(), _no_autocast(hidden_states):
        return _forward(hidden_states, call)[0]


def _leaves(hidden_states: Tensor, parameters: tuple[nn.Parameter, ...]) -> tuple[Tensor, ...]:
    """The trained parameters that autograd has to know of, which costs a node 2 us for each.

    It has to where nothing else needs a gradient, and for DDP, whose hooks run when autograd comes by. In their place
    stands the anchor of `in_recorded_step`, if there is one.
    """
    if (anchor := _recorded.get().anchor) is not None:
        return () if hidden_states.requires_grad else (anchor,)
    return () if hidden_states.requires_grad and not is_distributed() else parameters


@contextmanager
def in_recorded_step(anchor: Tensor | None, store: InputStore | None = None) -> Iterator[None]:
    """For a step that is recorded, or run as it will be.

    anchor: a leaf that requires a gradient, and gets none, for autograd to see in place of trained parameters. The
    accumulator of a parameter that an earlier loss still holds belongs to the stream of that loss, and waiting for
    another stream ends a capture. store: in place of the one that layers are called with.
    """
    token = _recorded.set(_Recorded(anchor, store))
    try:
        yield
    finally:
        _recorded.reset(token)


def is_distributed() -> bool:
    """Whether this process is one of several that train together."""
    return torch.distributed.is_available() and torch.distributed.is_initialized()


def _forward(hidden_states: Tensor, call: _Call) -> tuple[Tensor, Activations]:
    context = call.context
    context.matrices = call.weights.matrices(context.state)
    rows = hidden_states.reshape(-1, hidden_states.shape[-1])
    y, activations = block_forward(context, rows, call.layout)
    return y.view(hidden_states.shape), activations


def _rows(grad: Tensor) -> Tensor:
    """[T, H] with contiguous rows, which that of a sum is not."""
    rows = grad.reshape(-1, grad.shape[-1])
    return rows if rows.stride(1) == 1 else rows.contiguous()


def _no_autocast(tensor: Tensor) -> AbstractContextManager[Any]:
    """Dtypes are chosen here; autocast would cast again."""
    kind = tensor.device.type
    return torch.autocast(kind, enabled=False) if torch.is_autocast_enabled(kind) else _NOTHING


class _FusedLayer(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden_states: Tensor, call: _Call, *parameters: Tensor) -> Tensor:
        ctx.handle = None
        if call.policy == "offload_input" and call.store is not None:
            ctx.handle = call.store.put(hidden_states)  # it leaves while the layer computes
        else:
            ctx.save_for_backward(hidden_states)
        with _no_autocast(hidden_states):
            y, activations = _forward(hidden_states, call)
        if ctx.handle is not None and call.store is not None:
            call.store.settle()
        ctx.call, ctx.kept = call, kept(activations, call.context, call.policy)
        ctx.shape = hidden_states.shape
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        call: _Call = ctx.call
        activations, ctx.kept = ctx.kept, None
        if activations is None:
            raise RuntimeError(
                "a fused layer was asked for its gradient a second time; the first has overwritten its activations. "
                "Call backward once for each forward, or use `acceleration: off`."
            )
        handle, ctx.handle = ctx.handle, None
        x = call.store.get(handle) if handle is not None and call.store is not None else ctx.saved_tensors[0]
        del handle
        H, context = ctx.shape[-1], call.context
        with _no_autocast(grad):
            context.matrices = call.weights.matrices(context.state)
            dx = block_backward(
                context, activations, x.reshape(-1, H), call.layout, call.flat,
                _rows(grad), call.policy,
            )  # fmt: skip
            call.flat.finish(context.state.parameters)
        wanted = dx.view(ctx.shape) if ctx.needs_input_grad[0] else None
        return wanted, None, *(None for _ in ctx.needs_input_grad[2:])
