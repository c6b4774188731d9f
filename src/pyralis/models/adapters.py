"""What a decoder layer's linear layers hold right now: the base layer and PEFT's active LoRA on it.

PEFT may switch, disable, merge or replace adapters between any two forwards, so this is read anew each time and holds
no copies; hooks are the caller's affair. What the fused block does not compute exactly raises ModelError, whose text is
the reason that a report shows.
"""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass
from typing import Any

import torch
from peft.tuners.lora.layer import Linear as LoraLinear
from peft.tuners.lora.variants import DoraLinearVariant
from torch import Tensor, nn

from pyralis.errors import ModelError
from pyralis.models.spec import Projection
from pyralis.ops.lora_group import MAX_RANK

AUTOCAST_FROM = (torch.float32, torch.float16, torch.bfloat16)


@dataclass(frozen=True, slots=True, eq=False)
class Adapter:
    """y += scale * (dropout(x) A^T B^T + bias); A [r, K], B [N, r], bias [N]. magnitude [N]: DoRA's (`ops/dora.py`)."""

    A: nn.Parameter
    B: nn.Parameter
    bias: nn.Parameter | None
    scale: float
    dropout: float  # 0 in eval mode
    magnitude: nn.Parameter | None = None

    @property
    def rank(self) -> int:
        return self.A.shape[0]


@dataclass(frozen=True, slots=True, eq=False)
class LinearState:
    """One linear layer: `base` has `weight` and `bias`; `adapter` is None without one, disabled or merged."""

    path: str
    base: Any
    adapter: Adapter | None

    @property
    def four_bit(self) -> bool:
        return is_four_bit(self.base)

    @property
    def parameters(self) -> tuple[nn.Parameter, ...]:
        """All there are, trained or not."""
        adapter = self.adapter
        added = () if adapter is None else (adapter.A, adapter.B, adapter.bias, adapter.magnitude)
        return tuple(p for p in (self.base.weight, self.base.bias, *added) if p is not None)

    @property
    def key(self) -> Hashable:
        """Changes whenever buffers laid out for this state no longer serve; with another parameter in the same memory,
        whose gradients are its own, too."""
        adapter = self.adapter
        return (
            tuple((id(p), p.data_ptr(), p.dtype, p.requires_grad) for p in self.parameters),
            None if adapter is None else (adapter.scale, adapter.dropout, adapter.bias is None),
            adapter is None or adapter.magnitude is None,
        )


def glance(module: Any) -> tuple[Any, ...]:
    """All that `read_linear` looks at in a module, unjudged and in 2 us: while it is equal, so is what was read.

    Modules are held, and compared by identity; parameters are not held.
    """
    modules = module._modules
    if "lora_A" not in modules:
        return module, *_glance_parameters(module)
    base, names = modules["base_layer"], module.active_adapters
    found = (
        module, base, *_glance_parameters(base), module.disable_adapters, module.merged, tuple(names),
        vars(module).get("fan_in_fan_out"),
    )  # fmt: skip
    for name in names:
        A = modules["lora_A"]._modules.get(name)
        if A is not None:
            B, dropout = modules["lora_B"]._modules[name], modules["lora_dropout"]._modules[name]
            found += (
                A, *_glance_parameters(A), B, *_glance_parameters(B), dropout, vars(dropout).get("p"),
                dropout.training, module.scaling[name], type(module.lora_variant.get(name)),
            )  # fmt: skip
            if (dora := modules["lora_magnitude_vector"]._modules.get(name)) is not None:
                found += dora, *_glance_parameters(dora)
    return found


def _glance_parameters(module: Any) -> list[Any]:
    found: list[Any] = []
    for p in module._parameters.values():
        found += (None,) if p is None else (id(p), p.data_ptr(), p.shape, p.dtype, p.requires_grad)
    return found


def is_four_bit(base: nn.Module) -> bool:
    return type(base).__name__ == "Linear4bit" and type(base).__module__.startswith("bitsandbytes")


def read_linear(module: Any, projection: Projection) -> LinearState:
    """The state of the module at `projection.path`.

    Raises:
        ModelError: it is not a linear layer of that shape, plain or 4-bit, with at most one LoRA or DoRA active.
    """
    base, adapter = module, None
    if isinstance(module, LoraLinear) or _is_four_bit_lora(module):
        base, adapter = module._modules["base_layer"], _active_adapter(module, projection)
    if not (type(base) is nn.Linear or is_four_bit(base)):
        raise ModelError(
            f"{projection.path} is a {type(base).__module__}.{type(base).__name__}; the fused block takes nn.Linear, "
            "bitsandbytes' Linear4bit and PEFT's LoRA on them"
        )
    if (base._parameters["bias"] is not None) != projection.bias:
        raise ModelError(
            f"{projection.path} has {'a' if base.bias is not None else 'no'} bias, its spec says otherwise"
        )
    _check_weight(base, projection)
    return LinearState(projection.path, base, adapter)


def _is_four_bit_lora(module: nn.Module) -> bool:
    return type(module).__name__ == "Linear4bit" and type(module).__module__ == "peft.tuners.lora.bnb"


def _check_weight(base: Any, projection: Projection) -> None:
    weight = base._parameters["weight"]
    if type(weight) is nn.Parameter and tuple(weight.shape) == (projection.out_features, projection.in_features):
        return
    if type(weight.data) is not Tensor and not is_four_bit(base):
        raise ModelError(f"the weight of {projection.path} is a {type(weight.data).__name__}, a sharded or wrapped one")
    expected = (projection.out_features, projection.in_features)
    state = getattr(weight, "quant_state", None)
    shape = tuple(weight.shape if state is None else state.shape)
    if shape != expected and not (is_four_bit(base) and state is None):
        raise ModelError(
            f"the weight of {projection.path} has shape {list(shape)}, expected {list(expected)}"
            + (" (DeepSpeed ZeRO-3 keeps parameters empty between uses)" if weight.numel() == 0 else "")
        )


def _active_adapter(module: Any, projection: Projection) -> Adapter | None:
    """Submodules are looked up where `nn.Module` keeps them: by attribute they cost a microsecond each, every step."""
    path, modules = projection.path, module._modules
    if module.disable_adapters:
        if module.merged:
            raise ModelError(f"the adapters of {path} are merged and disabled; PEFT unmerges them in its own forward")
        return None
    if module.merged:
        return None
    lora_A = modules["lora_A"]._modules
    names = [name for name in module.active_adapters if name in lora_A]
    if not names:
        return None
    if len(names) > 1:
        raise ModelError(f"{path} has several active adapters ({', '.join(names)}); the fused block takes one")
    name = names[0]
    magnitude = _magnitude(module, name, path)
    if getattr(module, "fan_in_fan_out", False):
        raise ModelError(f"{path} has fan_in_fan_out; the fused block takes weights of [out, in]")
    A, B = lora_A[name], modules["lora_B"]._modules[name]
    dropout = modules["lora_dropout"]._modules[name]
    if (type(A), type(B)) != (nn.Linear, nn.Linear):
        raise ModelError(f"{path}: lora_A and lora_B are {type(A).__name__} and {type(B).__name__}, expected nn.Linear")
    if type(dropout) not in (nn.Dropout, nn.Identity):
        raise ModelError(f"{path}: lora_dropout is {type(dropout).__name__}, expected nn.Dropout")
    weight_A, in_B = A._parameters["weight"], B._parameters
    if weight_A.shape[0] > MAX_RANK:
        raise ModelError(f"{path}: the LoRA rank is {weight_A.shape[0]}, the fused block takes up to {MAX_RANK}")
    p = dropout.p if isinstance(dropout, nn.Dropout) and dropout.training else 0.0
    if p >= 1:
        raise ModelError(f"{path}: lora_dropout = {p}; expected a number below 1")
    if magnitude is not None and p and modules["base_layer"].weight.requires_grad:
        raise ModelError(f"{path} has DoRA with dropout over a base weight that is trained")
    return Adapter(weight_A, in_B["weight"], in_B["bias"], float(module.scaling[name]), p, magnitude)


def _magnitude(module: Any, name: str, path: str) -> nn.Parameter | None:
    """DoRA's magnitudes of the adapter `name`, if it has any; another variant of LoRA raises ModelError."""
    variant = module.lora_variant.get(name)
    if variant is None:
        return None
    if type(variant) is not DoraLinearVariant:
        kind = type(variant).__name__.removesuffix("LinearVariant")
        raise ModelError(f"{path} has {kind}, a variant of LoRA; the fused block takes plain LoRA and DoRA")
    weight: nn.Parameter = module.lora_magnitude_vector[name].weight
    device = module._modules["base_layer"].weight.device
    if weight.device != device:
        raise ModelError(f"{path}: DoRA's magnitudes are on {weight.device} and the weight on {device}")
    return weight


def compute_dtype(states: list[LinearState], fallback: torch.dtype, autocast: torch.dtype | None) -> torch.dtype:
    """The dtype that products are made in.

    Of plain weights, autocast's if it is on, else their own; of 4-bit ones what they say, `fallback` if they do not.

    Raises ModelError where the layers differ, in dtype or in kind.
    """
    kinds = {state.four_bit for state in states}
    if len(kinds) > 1:
        raise ModelError("some linear layers of a decoder layer are 4-bit and others are not")
    dtypes = {(s.base.compute_dtype or fallback) if s.four_bit else s.base.weight.dtype for s in states}
    if len(dtypes) > 1:
        names = ", ".join(sorted(str(d).removeprefix("torch.") for d in dtypes))
        raise ModelError(f"the linear layers of a decoder layer compute in different dtypes: {names}")
    dtype = dtypes.pop()
    return dtype if autocast is None or True in kinds or dtype not in AUTOCAST_FROM else autocast
