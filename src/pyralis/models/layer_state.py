"""What the fast path knows of one decoder layer, kept with it and looked at again in every call.

Adapters may be attached, switched or merged, and hooks registered, between any two calls. What a layer is (`detect.py`)
is read again when a module in it was replaced, hooks are looked for each time; adapters and weights the block reads.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from pyralis.models.detect import Reason, detect_layer
from pyralis.models.spec import LayerSpec
from pyralis.models.swap import FAST_STATE

HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
# transformers puts these on attention modules for good once `output_hidden_states` was asked for. They collect
# attention maps only while `output_attentions` is on, and that call runs stock.
HARMLESS_HOOKS = ("transformers.utils.output_capturing", "transformers.utils.generic")


@dataclass(eq=False)
class LayerState:
    """spec: what the layer is, or why it is not served. reason: why it ran stock in the last call; None: it did not."""

    spec: LayerSpec | Reason
    modules: list[nn.Module]
    hooks: list[Mapping[Any, Any]]
    reason: Reason | None = None


def layer_state(layer: Any) -> LayerState:
    """The state kept with the layer, made anew if there is none or a module in the layer was replaced."""
    state: LayerState | None = vars(layer).get(FAST_STATE)
    modules = list(_replaceable(layer))
    if state is None or state.modules != modules:
        inner = [module for module in layer.modules() if module is not layer]
        hooks = [vars(module)[name] for module in inner for name in HOOKS]
        state = vars(layer)[FAST_STATE] = LayerState(detect_layer(layer, _config(layer)), modules, hooks)
    return state


def look_again(layer: nn.Module) -> tuple[LayerState, LayerSpec | Reason]:
    """What the layer is as it stands, hooks considered, or why it has to run stock."""
    state = layer_state(layer)
    if isinstance(state.spec, LayerSpec) and any(state.hooks) and (hooked := hooked_module(layer)) is not None:
        return state, Reason(f"{hooked} has hooks, which would not be called")
    return state, state.spec


def hooked_module(layer: nn.Module) -> str | None:
    """The first module inside a layer that has hooks of its own (the layer's own are called in any case)."""
    for name, module in layer.named_modules():
        found = (hook for kind in HOOKS for hook in vars(module)[kind].values())
        if name and any(getattr(hook, "__module__", None) not in HARMLESS_HOOKS for hook in found):
            return name
    return None


def _replaceable(layer: Any) -> Iterator[nn.Module]:
    """The modules whose replacement changes what a layer is, adapters included. Runs in every call: 3 us a layer."""
    yield from layer._modules.values()
    for parent in layer._modules.values():
        for child in parent._modules.values():
            yield child
            if (adapters := child._modules.get("lora_A")) is not None:
                yield from adapters._modules.values()


def _config(layer: Any) -> Any:
    """The decoder's config, which the attention of every family that there is a spec for holds."""
    return getattr(getattr(layer, "self_attn", None), "config", None)
