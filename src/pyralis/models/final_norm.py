"""The norm behind the last decoder layer, in one launch each way.

Stock runs it as a dozen elementwise kernels over float32 copies: 0.77 ms of a step of Llama-3-8B with 4,096 tokens on
an H100, and where its backward starts 24 bytes for each element of the hidden states, which are 6 here in bfloat16.
Where no kernels run (a CPU), or a norm is not one of its family's, it stays stock's.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from pyralis.models.families import FAMILIES, Family
from pyralis.models.modules import Unlike, expect_class, expect_norm
from pyralis.models.swap import stock_class, swap
from pyralis.ops.rms_norm import rms_norm, supported

NAME = "norm"


def swap_final_norm(backbone: Any, family: Family) -> bool:
    """Make the backbone's last norm fast; whether it is one of the family's."""
    norm = backbone._modules.get(NAME)
    if norm is None or not _is_understood(norm, family, backbone.config.hidden_size):
        return False
    swap(norm, final_norm_forward)
    return True


def has_fast_norm(backbone: Any, stream: torch.dtype, stored: torch.dtype | None = None) -> bool:
    """Whether the last norm of an accelerated backbone, or of one that will be, is computed here, where kernels run.

    stream: the dtype of its input. stored: that of its weight; None: what it is now.
    """
    norm = backbone._modules.get(NAME)
    family = _family_of(stock_class(type(norm)))
    if family is None or not _is_understood(norm, family, backbone.config.hidden_size):
        return False
    return (norm.weight.dtype if stored is None else stored) == stream  # type: ignore[no-any-return]


def final_norm_forward(self: Any, hidden_states: Tensor) -> Tensor:
    """Of the norm, in place of its class's: [..., H] of [..., H], differentiable in them and in the weight."""
    stock: Any = stock_class(type(self))
    family = None if torch.compiler.is_compiling() else _family_of(stock)  # it warns of caches that it looks into
    if family is None or not _serves(self.weight, hidden_states):
        return stock.forward(self, hidden_states)  # type: ignore[no-any-return]
    eps = getattr(self, _eps_name(family))
    return rms_norm(hidden_states, self.weight, eps, unit_offset=family.unit_offset)


def _is_understood(norm: Any, family: Family, features: int) -> bool:
    try:
        expect_class(norm, family.source, f"{family.prefix}RMSNorm", NAME)
        expect_norm(norm, _eps_name(family), features, NAME)
    except Unlike:
        return False
    return True


def _serves(weight: Any, x: Tensor) -> bool:
    """A sharded weight, or one of another dtype (whose product stock rounds otherwise), is stock's affair."""
    if type(weight) is not nn.Parameter or type(weight.data) is not Tensor or type(x) is not Tensor:
        return False
    if weight.dtype != x.dtype or weight.shape != x.shape[-1:] or not x.numel():
        return False
    return supported(x, weight) is None


def _eps_name(family: Family) -> str:
    return "eps" if family.unit_offset else "variance_epsilon"


@cache
def _family_of(stock: type) -> Family | None:
    names = stock.__module__, stock.__name__
    return next((f for f in FAMILIES if names == (f.source, f"{f.prefix}RMSNorm")), None)
