"""The seam between stock transformers and Pyralis's fast layers: `accelerate(model)` says, per layer, what runs.

A decoder of a family in `PROVEN` is made fast: its layers, the decoder itself and the causal LM around it are swapped
(`swap.py`). Each layer that is understood (`detect.py`) then runs in the fused block, the others stock, and
`causal_lm_loss` stores no logits. All else stays as it is: parameters, state dicts, hooks, `generate`, PEFT (before or
after), saving, copying. `restore` undoes it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import torch
from torch import nn

from pyralis.models import fast_path
from pyralis.models.causal_lm import CausalState, causal_lm_forward, family_of_model
from pyralis.models.detect import Reason, detect_layer, family_of
from pyralis.models.families import FAMILIES
from pyralis.models.fast_path import backbone_forward, backbone_state, layer_forward, prepare_layers
from pyralis.models.final_norm import swap_final_norm
from pyralis.models.layer_state import hooked_module, layer_state
from pyralis.models.model_weights import ModelWeights
from pyralis.models.swap import FAST_STATE, STOCK_CLASS, fast_modules, is_fast, restore_module, stock_class, swap
from pyralis.ops._triton import unavailable

__all__ = [
    "PROVEN", "STOCK_CLASS", "Acceleration", "AccelerationReport", "LayerReport", "accelerate", "decoder_backbone",
    "decoder_layers", "fused_weights", "report", "restore",
]  # fmt: skip

Acceleration: TypeAlias = Literal["auto", "on", "off"]

# The families (`families.py`) whose parity tests pass in full with the fused block.
PROVEN: frozenset[str] = frozenset(family.name for family in FAMILIES)


@dataclass(frozen=True, slots=True)
class LayerReport:
    """What runs a decoder layer: Pyralis's fast block, or stock transformers for `reason`."""

    index: int
    fast: bool
    reason: str


@dataclass(frozen=True, slots=True)
class AccelerationReport:
    layers: tuple[LayerReport, ...]

    @property
    def fast_layers(self) -> int:
        return sum(layer.fast for layer in self.layers)

    @property
    def lines(self) -> tuple[str, ...]:
        """A line per kind of layer, for the start-up panel: "30 of 30 layers stock: ..."."""
        kinds = Counter((layer.fast, layer.reason) for layer in self.layers)
        return tuple(
            f"{count} of {len(self.layers)} layers {'fast' if fast else 'stock'}" + (f": {reason}" if reason else "")
            for (fast, reason), count in kinds.items()
        ) or ("no decoder layers found: all stock",)


def accelerate(
    model: nn.Module, mode: Acceleration = "auto", *, families: Collection[str] = PROVEN
) -> AccelerationReport:
    """Make fast what a fast block is known to compute exactly, and report on every layer.

    Args:
        mode: `auto` and `on` swap what can be swapped; `off` nothing. Neither fails where nothing can be.
        families: whose layers may be swapped, by the names in `families.py`.
    """
    if mode not in ("auto", "on", "off"):
        raise ValueError(f"acceleration is {mode!r}; expected 'auto', 'on' or 'off'")
    restore(model)
    layers, backbone = decoder_layers(model), decoder_backbone(model)
    if mode == "off":
        return _all_stock(layers, Reason("acceleration is off"))
    if (reason := _no_kernels(layers)) is not None:
        return _all_stock(layers, reason)
    reasons = [_reason(layer, backbone, families) for layer in layers]
    if backbone is not None and any(reason is None for reason in reasons):
        swap(backbone, backbone_forward)
        for layer in layers:
            swap(layer, layer_forward)
        if (family := family_of(layers[0])) is not None:
            swap_final_norm(backbone, family)
        for module in model.modules():
            if family_of_model(module) is not None and getattr(module, "model", None) is backbone:
                swap(module, causal_lm_forward)
    return _report(reasons)


def report(model: nn.Module) -> AccelerationReport:
    """What ran each layer in the model's last call, with the reasons of that call (adapters, hooks, a cache ...).

    Of a model that was not called since `accelerate`: what would run its layers now. Their weights are laid out for it.
    """
    layers, backbone = decoder_layers(model), decoder_backbone(model)
    if backbone is None or not is_fast(backbone):
        return _all_stock(layers, Reason("the model is not accelerated"))
    state = backbone_state(backbone)
    if state.reason is not None:
        return _all_stock(layers, state.reason)
    if not state.called:
        prepare_layers(backbone, state)
    return _report([layer_state(layer).reason for layer in layers])


def restore(model: nn.Module) -> int:
    """Give every swapped module its stock class back, and its parameters memory of their own; returns how many."""
    for module in fast_modules(model):
        state = vars(module).get(FAST_STATE)
        if isinstance(state, CausalState) and state.engine is not None:
            state.engine.drop()  # a recorded step that still runs reads what is given up here
        kept = getattr(state, "kept", None)
        if kept is not None and fast_path.block is not None:
            fast_path.block.release(kept)
    return sum([restore_module(module) for module in list(fast_modules(model))])


def fused_weights(model: nn.Module) -> ModelWeights | None:
    """The weights of the model's fused layers, laid out as they are now; None if none of its layers is fast."""
    backbone = decoder_backbone(model)
    if backbone is None or not is_fast(backbone):
        return None
    state = backbone_state(backbone)
    prepare_layers(backbone, state)
    weights: ModelWeights | None = getattr(state.kept, "weights", None)
    return weights


def decoder_layers(model: nn.Module) -> list[nn.Module]:
    """The decoder's layers in order, through any PEFT wrapper; empty if the model has no such list.

    They are the `ModuleList` as long as the config says the decoder is deep; the first, outermost one.
    """
    found = _layer_list(model)
    return [] if found is None else list(found[1])


def decoder_backbone(model: nn.Module) -> nn.Module | None:
    """The module that calls the decoder's layers."""
    found = _layer_list(model)
    return None if found is None else found[0]


def _layer_list(model: nn.Module) -> tuple[nn.Module, nn.ModuleList] | None:
    config: Any = getattr(model, "config", None)
    if hasattr(config, "get_text_config"):
        config = config.get_text_config(decoder=True)
    depth = getattr(config, "num_hidden_layers", None)
    for parent in model.modules():
        for child in parent.children():
            if isinstance(child, nn.ModuleList) and len(child) == depth:
                return parent, child
    return None


def _no_kernels(layers: list[nn.Module]) -> Reason | None:
    """Why kernels cannot run on the layers' GPU; None if they can, or on a CPU, where none are needed."""
    device = next((p.device for layer in layers for p in layer.parameters()), torch.device("cpu"))
    problem = unavailable(device) if device.type == "cuda" else None
    return None if problem is None else Reason(problem)


def _reason(layer: nn.Module, backbone: nn.Module | None, families: Collection[str]) -> Reason | None:
    """Why a layer is not made fast; None if it is."""
    if (reason := _static_reason(layer, backbone)) is not None:
        return reason
    family = family_of(layer)
    if family is None or family.name not in families:
        return Reason(f"the fused block is not yet proven for {stock_class(type(layer)).__name__}")
    return None if fast_path.block is not None else Reason("there is no fused block")


def _static_reason(layer: nn.Module, backbone: Any) -> Reason | None:
    spec = detect_layer(layer, getattr(backbone, "config", None))
    if isinstance(spec, Reason):
        return spec
    family = family_of(layer)
    owner = stock_class(type(backbone))
    if family is None or owner.__module__ != family.source or getattr(backbone, "layers", None) is None:
        return Reason(f"the layers are called by {owner.__name__}, which is not understood")
    if (hooked := hooked_module(layer)) is not None:
        return Reason(f"{hooked} has hooks, which would not be called")
    return None


def _all_stock(layers: list[nn.Module], reason: Reason) -> AccelerationReport:
    return _report([reason] * len(layers))


def _report(reasons: list[Reason | None] | list[Reason]) -> AccelerationReport:
    return AccelerationReport(
        tuple(LayerReport(i, reason is None, str(reason or "")) for i, reason in enumerate(reasons))
    )
