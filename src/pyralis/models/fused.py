"""The fused layer (`block.py`) as the block of the fast path: weights kept in step with modules, reasons collected."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from pyralis.memory.offload import PinnedStore
from pyralis.models.block import fused_layer
from pyralis.models.block_protocol import Prepared
from pyralis.models.detect import Reason
from pyralis.models.model_weights import ModelWeights
from pyralis.models.policy import SavePolicy
from pyralis.models.spec import LayerSpec
from pyralis.models.weights import LayerState, LayerWeights
from pyralis.ops.attention_spec import AttentionLayout

Layers = Sequence[tuple[nn.Module, LayerSpec]]


@dataclass(frozen=True, eq=False)
class Kept:
    """The weights of a model's fused layers, and the parts of the layers that they were laid out for.

    store: where the inputs of layers wait that are offloaded.
    """

    parts: list[tuple[nn.Module, LayerSpec, tuple[nn.Module | None, ...]]]
    weights: ModelWeights
    store: PinnedStore = field(default_factory=PinnedStore)


@dataclass(frozen=True, eq=False)
class Handle:
    weights: LayerWeights
    model: ModelWeights
    store: PinnedStore
    rng: Tensor | None  # of dropout, in this call


class FusedBlock:
    """Every gradient is written into `.grad` while the backward runs; what else would have seen it is looked for."""

    def prepare(self, layers: Layers, kept: Kept | None) -> Prepared:
        found = self.look(layers, kept)
        model: ModelWeights = found.kept.weights
        with _plain_tensors():
            model.copy()
            if model.rng is None:
                return found
            rng = _drawn(model.rng)
        handles = [handle if isinstance(handle, Reason) else replace(handle, rng=rng) for handle in found.handles]
        return Prepared(handles, found.kept)

    def look(self, layers: Layers, kept: Kept | None) -> Prepared:
        parts = [(layer, spec, tuple(layer._modules.values())) for layer, spec in layers]
        if kept is None or kept.parts != parts:
            kept = Kept(parts, ModelWeights(layers))
        model, autocast = kept.weights, _autocast_dtype(layers[0][0])
        with _plain_tensors():
            problems = model.look(autocast)
        handles: list[Handle | Reason] = []
        for weights, problem in zip(model.layers, problems):
            reason = Reason(problem) if problem is not None else _unserved(weights.state, autocast, model.take)
            handles.append(Handle(weights, model, kept.store, None) if reason is None else reason)
        return Prepared(handles, kept)

    def release(self, kept: Kept) -> None:
        kept.weights.release()

    def run(
        self, handle: Handle, hidden_states: Tensor, cos: Tensor, sin: Tensor, layout: AttentionLayout,
        *, policy: SavePolicy, tile: int | None = None,
    ) -> Tensor:  # fmt: skip
        with _plain_tensors():
            return fused_layer(
                hidden_states, cos, sin, layout, handle.weights, handle.model.gradients,
                policy=policy, tile=tile, rng=handle.rng, store=handle.store,
            )  # fmt: skip


def _drawn(rng: Tensor) -> Tensor:
    """Where this call's dropout masks start, from torch's generator: `torch.manual_seed` and the random states that a
    checkpoint holds say what is dropped, as they do in stock."""
    return torch.randint(2**62, (2,), dtype=torch.int64, device=rng.device)


_NOTHING = nullcontext()


def _plain_tensors() -> AbstractContextManager[None]:
    """Buffers made under `torch.inference_mode` could not be written to in training."""
    return _outside_inference_mode() if torch.is_inference_mode_enabled() else _NOTHING


@contextmanager
def _outside_inference_mode() -> Iterator[None]:
    with torch.inference_mode(False), torch.no_grad():
        yield


def _autocast_dtype(layer: nn.Module) -> torch.dtype | None:
    """The dtype of autocast where the layer is, if it is on."""
    kind = next(layer.parameters()).device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None


def _unserved(state: LayerState, autocast: torch.dtype | None, take: Any) -> Reason | None:
    """Why a layer whose weights are laid out cannot be served in this call."""
    if autocast is not None and autocast != state.dtype:
        return Reason(f"autocast to {_name(autocast)} over 4-bit weights that compute in {_name(state.dtype)}")
    norms = {weight.dtype for weight, _ in state.norms.values()}
    if autocast is None and norms != {state.dtype}:
        return Reason(f"norms in {', '.join(sorted(map(_name, norms)))} between layers in {_name(state.dtype)}")
    for parameter in state.parameters:
        if _hooked(parameter, take):
            return Reason("a trained parameter has hooks on its gradient, which would not be called")
    return None


def _hooked(parameter: Any, take: Any) -> bool:
    """take: of `FlatGradients`, which is called in any case."""
    after = parameter._post_accumulate_grad_hooks
    return bool(parameter._backward_hooks) or (bool(after) and any(hook != take for hook in after.values()))


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
