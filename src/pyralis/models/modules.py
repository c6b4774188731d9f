"""Checks that a module is what it is taken for. Each raises `Unlike` with the reason, a phrase for "stock: ..."."""

from __future__ import annotations

import functools
import inspect
import math
from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch import nn

from pyralis.models.spec import Activation
from pyralis.models.swap import stock_class


class Unlike(Exception):
    """A module is not what the fused block computes; the message says how."""


class LinearShape(NamedTuple):
    in_features: int
    out_features: int
    bias: bool


def expect_class(module: nn.Module, source: str, name: str, what: str) -> nn.Module:
    """The module, if its class (that it stands for, if it is a fast one) is `source`.`name`, `forward` its own."""
    cls: Any = stock_class(type(module))
    if (cls.__module__, cls.__name__) != (source, name):
        raise Unlike(f"{what} is {_described(cls)}, not {name}")
    if "forward" in vars(module):
        raise Unlike(f"forward of {what} was replaced on the instance")
    if inspect.unwrap(cls.forward).__module__ != source:
        raise Unlike(f"forward of {name} was replaced by {inspect.unwrap(cls.forward).__module__}")
    return module


def expect_members(module: nn.Module, names: Iterable[str], what: str) -> None:
    """Raise unless the module holds exactly these modules, and no parameters or buffers itself."""
    expected, found = set(names), {name for name, child in module.named_children() if child is not None}
    if missing := sorted(expected - found):
        raise Unlike(f"{what} has no {', '.join(missing)}")
    own = {name for name, _ in (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False))}
    if extra := sorted(found - expected | own):
        raise Unlike(f"{what} has {', '.join(extra)} besides")


def expect_number(module: nn.Module, name: str) -> float:
    value = getattr(module, name, None)
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise Unlike(f"{name} is {value!r}, not a number")
    return float(value)


def expect_norm(module: Any, eps_name: str, size: int, what: str) -> float:
    """The eps of an RMS norm over `size` features that holds nothing but a weight."""
    expect_members_of_leaf(module, {"weight"}, what)
    shape = tuple(module.weight.shape)
    if shape != (size,):
        raise Unlike(f"{what} norms {'x'.join(map(str, shape))} features, not {size}")
    return expect_number(module, eps_name)


def expect_projection(module: nn.Module, what: str) -> LinearShape:
    """The shape of a linear layer: plain, in bitsandbytes' 4 bits, or with PEFT's LoRA on one of these."""
    base = module
    if is_lora(module):
        base = module.base_layer  # type: ignore[assignment]
        if getattr(module, "fan_in_fan_out", False):
            raise Unlike(f"{what} has a transposed weight")
    elif type(module).__module__.startswith("peft."):
        raise Unlike(f"{what} has an adapter of PEFT's class {_described(type(module))}")
    four_bit = (type(base).__module__, type(base).__name__) == ("bitsandbytes.nn.modules", "Linear4bit")
    if not four_bit:
        expect_class(base, "torch.nn.modules.linear", "Linear", what)
    elif "forward" in vars(base):
        raise Unlike(f"forward of {what} was replaced on the instance")
    expect_members_of_leaf(base, {"weight", "bias"}, what)
    linear: Any = base
    shape = LinearShape(linear.in_features, linear.out_features, linear.bias is not None)
    if not four_bit and tuple(linear.weight.shape) != (shape.out_features, shape.in_features):
        # ZeRO-3 empties weights, FSDP flattens them.
        raise Unlike(f"the weight of {what} is {'x'.join(map(str, linear.weight.shape))} here: it is kept elsewhere")
    return shape


def is_lora(module: nn.Module) -> bool:
    """Whether this is PEFT's LoRA on a linear layer, plain or in 4 bits; not a subclass of it."""
    return (type(module).__module__, type(module).__name__) in (
        ("peft.tuners.lora.layer", "Linear"),
        ("peft.tuners.lora.bnb", "Linear4bit"),
    )


def activation_of(module: nn.Module) -> Activation:
    """Which of the block's activations a module computes, by the function that it calls."""
    cls, inner = type(module), getattr(module, "act", None)
    if "forward" in vars(module):
        raise Unlike("forward of the activation was replaced on the instance")
    if cls is nn.SiLU or _is_activation(cls, "SiLUActivation"):
        return "silu"
    if _is_activation(cls, "GELUActivation") and inner is torch.nn.functional.gelu:
        return "gelu"
    if (
        (_is_activation(cls, "GELUTanh") or _is_activation(cls, "PytorchGELUTanh"))
        and isinstance(inner, functools.partial)
        and inner.func is torch.nn.functional.gelu
        and (inner.args, inner.keywords) == ((), {"approximate": "tanh"})
    ):
        return "gelu_tanh"
    raise Unlike(f"the activation is {_described(cls)}; SiLU, GELU and its tanh form are known")


def _is_activation(cls: type, name: str) -> bool:
    source = "transformers.activations"
    return (cls.__module__, cls.__name__) == (source, name) and inspect.unwrap(cls.forward).__module__ == source  # type: ignore[attr-defined]


def expect_members_of_leaf(module: nn.Module, names: set[str], what: str) -> None:
    """Raise if the module holds parameters, buffers or modules other than these."""
    held = (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False), *module.named_children())
    if extra := sorted({name for name, _ in held} - names):
        raise Unlike(f"{what} has {', '.join(extra)} besides")


def _described(cls: type) -> str:
    return f"{cls.__module__}.{cls.__qualname__}"
