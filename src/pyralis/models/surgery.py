"""The seam between stock transformers and Pyralis's fast layers: `accelerate(model)` says, per layer, what runs.

No fast layer exists yet, so today every layer stays stock, the report says so, and the model is not touched.

How a layer will be swapped, and why so:

- Per instance: `layer.__class__` is set to a subclass made for it, whose class dictionary carries `forward`. Two models
  in one process can differ, nothing is patched on a class or a module, and parameters, state-dict keys, hooks,
  `isinstance`, `generate`, PEFT and saving go on working. An instance attribute `layer.forward = ...` would not do:
  from transformers 5.23 on it silently turns gradient checkpointing off.
- The subclass keeps `__name__`, `__qualname__` and `__module__` of the stock class (`config.json` records the name, and
  transformers' output recorder looks classes up by it), and has `_pyralis_stock_class`, by which `restore` undoes it.
- A layer is swapped only when all of it is understood; what is not runs stock, with the reason in the report.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Literal, TypeAlias

from torch import nn

Acceleration: TypeAlias = Literal["auto", "on", "off"]

STOCK_CLASS = "_pyralis_stock_class"


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


def accelerate(model: nn.Module, mode: Acceleration = "auto") -> AccelerationReport:
    """Swap each decoder layer that a fast block is known to compute exactly, and report on every layer.

    Args:
        mode: `auto` and `on` swap what can be swapped; `off` nothing. Neither fails where nothing can be.
    """
    if mode not in ("auto", "on", "off"):
        raise ValueError(f"acceleration is {mode!r}; expected 'auto', 'on' or 'off'")
    layers = decoder_layers(model)
    return AccelerationReport(
        tuple(LayerReport(index, False, _stock(layer, mode)) for index, layer in enumerate(layers))
    )


def restore(model: nn.Module) -> int:
    """Give every swapped module its stock class back; returns how many there were."""
    restored = 0
    for module in model.modules():
        stock = getattr(type(module), STOCK_CLASS, None)
        if stock is not None:
            module.__class__ = stock
            restored += 1
    return restored


def decoder_layers(model: nn.Module) -> list[nn.Module]:
    """The decoder's layers in order, through any PEFT wrapper; empty if the model has no such list.

    They are the `ModuleList` as long as the config says the decoder is deep; the first, outermost one.
    """
    config = getattr(model, "config", None)
    depth = getattr(config, "num_hidden_layers", None)
    for module in model.modules():
        if isinstance(module, nn.ModuleList) and len(module) == depth:
            return list(module)
    return []


def _stock(layer: nn.Module, mode: Acceleration) -> str:
    if mode == "off":
        return "acceleration is off"
    return f"there is no fast block for {type(layer).__name__} yet"
