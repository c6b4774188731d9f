"""What recorded steps of a model are fixed to: while it is equal they hold. Looked at before each step, on the host."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from pyralis.models.causal_lm import Head
from pyralis.models.checkpointing import mlp_tile, save_policy
from pyralis.models.detect import Reason
from pyralis.models.fast_path import backbone_state, prepare_layers
from pyralis.models.layer_state import HOOKS
from pyralis.models.swap import is_fast

OUTER_HOOKS = ("NEFTune", "neftune", "make_inputs_require_grad", "_require_grads_hook")


def step_state(causal: Any, head: Head) -> tuple[Any, ...] | Reason:
    """Equal for as long as a recorded step of the model would be recorded as it was; or why nothing can be recorded.

    The layers' own states tell of adapters, weights moved and dropout; beside them stand the modules around the layers,
    how layers are checkpointed, and autocast. What layers compute with is not brought up to date.
    """
    backbone = causal.model
    if not is_fast(backbone):
        return Reason("the decoder is not accelerated")
    outside = [module for name, module in backbone._modules.items() if name != "layers"]
    for module in (backbone, *outside, causal.lm_head):
        if (hook := _odd_hook(module)) is not None:
            return Reason(f"{type(module).__name__} has a hook, {hook}, which a recorded step would not call")
    if (rope := _stretched_rope(backbone)) is not None:
        return Reason(f"RoPE of kind {rope}, whose angles depend on the longest position, of padding too")
    state = backbone_state(backbone)
    if len(prepare_layers(backbone, state, copies=False)) != len(backbone.layers):
        return Reason("not all layers are fast")
    model = state.kept.weights
    if model.take is not None:
        return Reason("the optimizer steps in the backward")
    if len({*(layer.state.device for layer in model.layers), head.weight.device}) > 1:
        return Reason("layers lie on several devices")
    around = [t for module in (*outside, causal.lm_head) for t in (*module.parameters(), *module.buffers())]
    kind = model.layers[0].state.device.type
    return (
        *(layer.state for layer in model.layers), model.gradients,
        *((t.data_ptr(), t.requires_grad) for t in around), head.weight.data_ptr(),
        tuple((save_policy(layer), mlp_tile(layer)) for layer in backbone.layers), causal.training,
        torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind), torch.are_deterministic_algorithms_enabled(),
    )  # fmt: skip


def _stretched_rope(backbone: Any) -> str | None:
    """The kind of rotary positions that a longer row changes for all of its tokens."""
    kinds = getattr(getattr(backbone, "rotary_emb", None), "rope_type", None)
    for kind in kinds.values() if isinstance(kinds, dict) else (kinds,):
        if isinstance(kind, str) and ("dynamic" in kind or kind == "longrope"):
            return kind
    return None


def _odd_hook(module: nn.Module) -> str | None:
    """The first hook that is not known to be at home in a recorded step."""
    for kind in HOOKS:
        for hook in vars(module)[kind].values():
            name = getattr(hook, "__qualname__", type(hook).__qualname__)
            if not any(known in name for known in OUTER_HOOKS):
                return name
    return None
