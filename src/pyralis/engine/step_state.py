"""What recorded steps of a model are fixed to: while it is equal they hold. Looked at before each step, on the host."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from pyralis.models.causal_lm import Head
from pyralis.models.checkpointing import mlp_tile, save_policy
from pyralis.models.detect import Reason
from pyralis.models.fast_path import backbone_state, prepare_layers, refuses
from pyralis.models.swap import is_fast
from pyralis.models.unpadding import odd_hook

PLAIN = (bool, int, float, str, type(None))
BOOKKEEPING = frozenset(vars(nn.Module())) - {"training"}


def step_state(causal: Any, head: Head) -> tuple[Any, ...] | Reason:
    """Equal for as long as a recorded step of the model would be recorded as it was; or why nothing can be recorded.

    The layers' own states tell of adapters, weights moved and dropout; beside them stand the modules around the layers,
    how layers are checkpointed, and autocast. What layers compute with is not brought up to date.
    """
    backbone = causal.model
    if not is_fast(backbone):
        return Reason("the decoder is not accelerated")
    if (refused := refuses(backbone, {"use_cache": False})) is not None:
        return refused
    children = [child for name, child in backbone._modules.items() if name != "layers"]
    outside = [module for child in (*children, causal.lm_head) for module in child.modules()]
    if (watched := _watched(backbone, outside)) is not None:
        return watched
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
    around = [t for module in outside for held in (module._parameters, module._buffers) for t in held.values()]
    around = [t for t in around if t is not None]
    if any(t.requires_grad and (t._backward_hooks or _after(t)) for t in around):  # a replay would not call them
        return Reason("a trained parameter has hooks on its gradient")
    kind = model.layers[0].state.device.type
    return (
        *(layer.state for layer in model.layers), model.gradients,
        *((id(t), t.data_ptr(), t.shape, t.dtype, t.requires_grad) for t in around),
        *(_settings(module) for module in outside), head.weight.data_ptr(), head.softcap, head.logit_scale,
        tuple((save_policy(layer), mlp_tile(layer)) for layer in backbone.layers), causal.training,
        torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind), torch.are_deterministic_algorithms_enabled(),
    )  # fmt: skip


def _watched(backbone: Any, outside: Sequence[nn.Module]) -> Reason | None:
    """What would be called in each step and could not be called in a replay."""
    for module in (backbone, *backbone.layers, *outside):
        if (hook := odd_hook(module)) is not None:
            return Reason(f"{type(module).__name__} has a hook, {hook}, which a recorded step would not call")
        if "forward" in vars(module):
            return Reason(f"forward of {type(module).__name__} was replaced on the instance")
    if nn.modules.module._has_any_global_hook():
        return Reason("there are hooks on all modules, which a recorded step would not call")
    if torch.is_anomaly_enabled():
        return Reason("autograd looks for anomalies, which it would not see in a recorded step")
    return None


def _after(tensor: Tensor) -> Any:
    return getattr(tensor, "_post_accumulate_grad_hooks", None)


def _settings(module: nn.Module) -> list[Any]:
    """Numbers and names that a module's forward may read: eps, scales, active adapters."""
    found: list[Any] = [module]
    for name, value in vars(module).items():
        if name in BOOKKEEPING:
            continue
        if isinstance(value, PLAIN):
            found += name, value
        elif isinstance(value, dict | list | tuple):
            held = value.values() if isinstance(value, dict) else value
            found += name, *(v for v in held if isinstance(v, PLAIN))
    return found


def _stretched_rope(backbone: Any) -> str | None:
    """The kind of rotary positions that a longer row changes for all of its tokens."""
    kinds = getattr(getattr(backbone, "rotary_emb", None), "rope_type", None)
    for kind in kinds.values() if isinstance(kinds, dict) else (kinds,):
        if isinstance(kind, str) and ("dynamic" in kind or kind == "longrope"):
            return kind
    return None
