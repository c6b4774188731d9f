"""The truth: stock transformers in float64, one layer at a time, so that any model fits that fits on the device.

`exact(model)` lets decoder layers, the last norm, the head and trained embeddings run as float64 copies of themselves,
made for the call and dropped after it; the backward makes them again and runs their forward once more. It is the code
of transformers and PEFT: nothing of the fast path's understanding of a model is in it. Where that code casts to float32
(norms, softmax), it stays in float64 here.

What a model rounds before it computes is part of what it is: 4-bit weights are those that bitsandbytes multiplies, and
frozen embeddings and the angles of RoPE come in the model's dtype.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from pyralis.errors import ModelError
from pyralis.models.adapters import is_four_bit
from pyralis.models.nf4 import plain_layer
from pyralis.models.surgery import decoder_backbone, decoder_layers
from pyralis.models.swap import FAST_STATE, restore_module, swap


@dataclass(eq=False)
class Exact:
    """dtype: of the truth. gradients: of the model's parameters, by `id`, in that dtype."""

    dtype: torch.dtype
    gradients: dict[int, Tensor] = field(default_factory=dict)


@contextmanager
def exact(model: Any, dtype: torch.dtype = torch.float64) -> Iterator[Exact]:
    """Within the block a stock `model` computes in `dtype`, and gradients go into what is yielded, not into `.grad`."""
    truth = Exact(dtype)
    units = _units(model)
    for unit in units:
        swap(unit, _forward)
        vars(unit)[FAST_STATE] = truth
    try:
        yield truth
    finally:
        for unit in units:
            restore_module(unit)


def check_exact(model: nn.Module) -> None:
    """Raise ModelError if a weight is neither plain nor bitsandbytes' 4-bit: there is no float64 of it."""
    packed = {f"{name}.weight" for name, module in model.named_modules() if is_four_bit(module)}
    for name, parameter in model.named_parameters():
        if name not in packed and not parameter.is_floating_point():
            kind = str(parameter.dtype).removeprefix("torch.")
            raise ModelError(f"{name} is in {kind}; plain weights and bitsandbytes' 4-bit ones can be verified.")


def _units(model: Any) -> list[nn.Module]:
    backbone: Any = decoder_backbone(model)
    embeddings = model.get_input_embeddings()
    trained = any(p.requires_grad for p in embeddings.parameters())
    return [*decoder_layers(model), backbone.norm, model.get_output_embeddings(), *([embeddings] if trained else ())]


def _forward(module: Any, first: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """In place of a unit's own; first: hidden states, or token ids."""
    truth: Exact = vars(module)[FAST_STATE]
    args, kwargs = _cast((args, kwargs), truth.dtype)
    anchor = torch.zeros((), requires_grad=True)  # so that there is a backward, whatever `first` is
    result: Any = _Unit.apply(_cast(first, truth.dtype), anchor, module, truth, args, kwargs)
    return result


class _Unit(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, first: Tensor, anchor: Tensor, module: nn.Module, truth: Exact, args: Any, kwargs: Any
    ) -> Tensor:
        ctx.save_for_backward(first)
        ctx.rest = module, truth, args, kwargs
        made = _copy_of(module, truth.dtype)
        with _InPlaceOfFloat32(truth.dtype):
            result: Tensor = made(first, *args, **kwargs)
        return result

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        module, truth, args, kwargs = ctx.rest
        first = ctx.saved_tensors[0].detach()
        if first.is_floating_point():
            first.requires_grad_()
        made = _copy_of(module, truth.dtype)
        with torch.enable_grad(), _InPlaceOfFloat32(truth.dtype):
            made(first, *args, **kwargs).backward(upstream[0])
        originals = dict(module.named_parameters())
        for name, parameter in made.named_parameters():
            if parameter.grad is not None:
                key = id(originals[name])
                known = truth.gradients.get(key)
                truth.gradients[key] = parameter.grad if known is None else known + parameter.grad
        return first.grad, None, None, None, None, None


def _copy_of(module: nn.Module, dtype: torch.dtype) -> nn.Module:
    """A stock copy of `module` in `dtype`, 4-bit layers as plain ones."""
    made = copy.deepcopy(module)
    restore_module(made)
    for name, layer in list(made.named_modules()):
        if is_four_bit(layer):
            made.set_submodule(name, plain_layer(layer, _multiplied_weight(layer)))
    return made.to(dtype)


def _multiplied_weight(layer: Any) -> Tensor:
    """[out, in] as a 4-bit layer multiplies it, in its compute dtype."""
    from bitsandbytes.functional import dequantize_4bit

    weight: Tensor = dequantize_4bit(layer.weight.data, layer.weight.quant_state)
    return weight.to(layer.compute_dtype or weight.dtype)


def _cast(value: Any, dtype: torch.dtype) -> Any:
    """Floating tensors in tuples and dictionaries to `dtype`, the rest as it is."""
    if isinstance(value, Tensor):
        return value.to(dtype) if value.is_floating_point() else value
    if isinstance(value, tuple):
        return tuple(_cast(part, dtype) for part in value)
    if isinstance(value, dict):
        return {key: _cast(part, dtype) for key, part in value.items()}
    return value


class _InPlaceOfFloat32(TorchFunctionMode):
    """`x.float()`, `x.to(torch.float32)` and `softmax(..., dtype=torch.float32)` go to another dtype instead."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.dtype = dtype

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is Tensor.float:
            return args[0].to(self.dtype)
        args = tuple(self.dtype if value is torch.float32 else value for value in args)
        kwargs = {name: self.dtype if value is torch.float32 else value for name, value in (kwargs or {}).items()}
        return func(*args, **kwargs)
