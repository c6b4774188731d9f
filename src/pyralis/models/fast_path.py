"""The forward of a fast decoder ("backbone") and of its layers.

The backbone decides once per call how the tokens lie and which layers are ready, then calls the stock backbone, which
embeds, computes the angles of RoPE, goes through the layers and norms, as every family does it in its own way. It hands
the decision on to the layers as a keyword argument. A layer without it (a cache in use, `generate`, a layer called by
hand) runs stock, and so does a whole call that is not understood: `LayerState.reason` and `BackboneState.reason` tell.

Three things differ from stock: no cache is made while training unless `use_cache=True` is given, since nothing could
read it; and where all layers are fast no attention mask is built, and padded rows are computed without their padding
(`unpadding.py`), for which zeros stand in what is returned.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from pyralis.compat import CACHE_ARGUMENTS
from pyralis.models.block_protocol import Block
from pyralis.models.checkpointing import mlp_tile, save_policy
from pyralis.models.detect import Reason
from pyralis.models.fused import FusedBlock
from pyralis.models.layer_state import LayerState, look_again
from pyralis.models.layout import HINTS, READ, BatchShape, batch_layout, refuse_shared_keys
from pyralis.models.real_tokens import RealTokens
from pyralis.models.spec import LayerSpec
from pyralis.models.swap import FAST_STATE, call_stock, stock_class
from pyralis.models.unpadding import UNPADDED, Kept, find_real_tokens, padded_again, without_padding
from pyralis.models.wide_residual import in_dtype, stream_dtype
from pyralis.ops.attention_spec import AttentionLayout

CALL = "pyralis_call"
LAYOUT = "pyralis_layout"  # an argument of the decoder: its AttentionLayout, from a caller that has it
# Arguments of a decoder besides `READ` that mean nothing to a layer, or that are looked at here.
UNDERSTOOD = frozenset(
    {
        *READ, *CACHE_ARGUMENTS, "input_ids", "inputs_embeds", "use_cache", "cache_position", "output_attentions",
        "output_hidden_states", "return_dict", "num_items_in_batch", "seq_idx",
    }
)  # fmt: skip


@dataclass(frozen=True, eq=False)
class Call:
    """A call of the backbone, for its layers: how tokens lie, and the handles of those that are ready, by `id`.

    tokens: which ones are computed, where padding is left out; the angles that come are those of the padded call.
    narrow: the dtype of the embeddings, where the residual stream is another (`wide_residual.py`).
    """

    layout: AttentionLayout
    handles: Mapping[int, Any]
    is_whole: bool = False  # all layers are fast
    tokens: RealTokens | None = None
    narrow: list[torch.dtype] = field(default_factory=list)
    _angles: dict[int, tuple[Tensor, Tensor, Tensor]] = field(default_factory=dict)

    def stream(self, layer: nn.Module, hidden_states: Tensor) -> Tensor:
        """The hidden states in the dtype of the residual stream, where all layers are fast."""
        dtype = stream_dtype(layer, hidden_states.dtype) if self.is_whole else hidden_states.dtype
        if dtype == hidden_states.dtype:
            return hidden_states
        self.narrow.append(hidden_states.dtype)
        return hidden_states.to(dtype)

    def angles(self, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        """Those of the tokens that are computed; gathered once for all layers that get the same ones."""
        if self.tokens is None:
            return cos, sin
        found = self._angles.get(id(cos))
        if found is None:  # cos stays alive with it, so that no other tensor gets its id
            found = self._angles[id(cos)] = (cos, self.tokens.gathered(cos), self.tokens.gathered(sin))
        return found[1], found[2]


@dataclass(eq=False)
class BackboneState:
    """called: whether the layers were looked at. reason: why the last call ran stock as a whole, None if it did not.
    kept: of `Prepared`."""

    called: bool = False
    reason: Reason | None = None
    kept: Any = None


block: Block | None = FusedBlock()


def backbone_forward(self: Any, *args: Any, **kwargs: Any) -> Any:
    """Of the decoder, in place of its class's."""
    stock: Any = stock_class(type(self))
    if torch.compiler.is_compiling():  # the stock layers are what it can trace
        refuse_shared_keys(kwargs, "torch.compile traces the stock layers")
        return stock.forward(self, *args, **{name: value for name, value in kwargs.items() if name not in HINTS})
    layout: AttentionLayout | None = kwargs.pop(LAYOUT, None)
    kept: Kept | None = kwargs.pop(UNPADDED, None)
    arguments = dict(zip(_parameters(stock), args)) | kwargs
    state = backbone_state(self)
    call = _plan(self, state, arguments, layout)
    if isinstance(call, Reason) or len(call.handles) < len(self.layers):
        refuse_shared_keys(arguments, str(call) if isinstance(call, Reason) else "some layers run stock")
    for name in HINTS:
        arguments.pop(name, None)
    state.reason = call if isinstance(call, Reason) else None
    if isinstance(call, Reason) or not call.handles:
        return stock.forward(self, **arguments)
    arguments["use_cache"] = False
    for name in CACHE_ARGUMENTS:  # None, or there were no call
        arguments.pop(name, None)
    if len(call.handles) < len(self.layers):
        return stock.forward(self, **arguments, **{CALL: call})
    # Nobody reads the mask. Stock takes a 4-D one as it is instead of making one.
    arguments["attention_mask"] = torch.empty((1, 1, 1, 1), device="meta")
    call, tokens = replace(call, is_whole=True), find_real_tokens(self, arguments, call.layout)
    if tokens is not None:
        call = replace(call, layout=tokens.layout, tokens=tokens)
        arguments = without_padding(arguments, tokens)
    output = stock.forward(self, **arguments, **{CALL: call})
    if call.narrow:
        output = in_dtype(output, call.narrow[0])
    if tokens is None:
        return output
    if kept is None:
        return padded_again(output, tokens)
    kept.tokens = tokens
    return output


def layer_forward(self: Any, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
    """Of a decoder layer, in place of its class's."""
    call: Call | None = kwargs.pop(CALL, None)
    if call is None or block is None or (handle := call.handles.get(id(self))) is None:
        return call_stock(self, hidden_states, *args, **kwargs)
    cos, sin = call.angles(*kwargs["position_embeddings"])
    return block.run(
        handle, call.stream(self, hidden_states), cos, sin, call.layout, policy=save_policy(self), tile=mlp_tile(self)
    )


def backbone_state(backbone: nn.Module) -> BackboneState:
    return vars(backbone).setdefault(FAST_STATE, BackboneState())


def _plan(
    backbone: Any, state: BackboneState, arguments: Mapping[str, Any], layout: AttentionLayout | None
) -> Call | Reason:
    if (refused := refuses(backbone, arguments)) is not None:
        return refused
    inputs = arguments.get("input_ids")
    inputs = arguments.get("inputs_embeds") if inputs is None else inputs
    if inputs is None or inputs.dim() not in (2, 3):
        return Reason("no input_ids or inputs_embeds")
    found = layout or batch_layout(BatchShape(inputs.shape[0], inputs.shape[1], inputs.device), arguments)
    return found if isinstance(found, Reason) else Call(found, prepare_layers(backbone, state))


def refuses(backbone: Any, arguments: Mapping[str, Any]) -> Reason | None:
    """Why a call of the backbone would run stock as a whole, whatever its layers and its batch; None: it would not."""
    odd = [name for name, value in arguments.items() if value is not None and name not in UNDERSTOOD]
    if odd:
        return Reason(f"the argument {odd[0]} is not understood")
    if getattr(backbone, "_is_replica", False):
        return Reason("a replica of nn.DataParallel, whose parameters are copies; launch with torchrun instead")
    if _wanted(backbone, arguments, "output_attentions"):
        return Reason("attention maps are asked for, which the fast path never has")
    if any(arguments.get(name) is not None for name in CACHE_ARGUMENTS) or _caches(backbone, arguments):
        return Reason("a KV cache is in use")
    return None


def prepare_layers(backbone: Any, state: BackboneState, *, copies: bool = True) -> dict[int, Any]:
    """The handles of the layers that can be served now, by `id`; the others' states get the reason.

    copies: whether what the layers compute with is brought up to date; without it they are only looked at.
    """
    state.called = True
    served: list[tuple[nn.Module, LayerSpec]] = []
    states: list[LayerState] = []
    for layer in backbone.layers:
        state_of_layer, found = look_again(layer)
        state_of_layer.reason = found if isinstance(found, Reason) else None
        if isinstance(found, LayerSpec):
            served.append((layer, found))
            states.append(state_of_layer)
    if block is None or not served:
        return {}
    prepared = (block.prepare if copies else block.look)(served, state.kept)
    state.kept = prepared.kept
    ready = {}
    for (layer, _), layer_state, handle in zip(served, states, prepared.handles):
        if isinstance(handle, Reason):
            layer_state.reason = handle
        else:
            ready[id(layer)] = handle
    return ready


def _caches(backbone: Any, arguments: Mapping[str, Any]) -> bool:
    """Whether the caller is to get a cache. One that stock makes unasked while training is of no use to anybody."""
    if (given := arguments.get("use_cache")) is not None:
        return bool(given)
    training = backbone.training and torch.is_grad_enabled()
    return bool(getattr(backbone.config, "use_cache", False)) and not training


def _wanted(backbone: Any, arguments: Mapping[str, Any], name: str) -> bool:
    value = arguments.get(name)
    return bool(getattr(backbone.config, name, False) if value is None else value)


@cache
def _parameters(stock: Any) -> tuple[str, ...]:
    return tuple(inspect.signature(stock.forward).parameters)[1:]
