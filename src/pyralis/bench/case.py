"""What is measured: a model's sizes, and an op at those sizes beside its peers."""

from __future__ import annotations

from collections.abc import Callable
from contextvars import ContextVar
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from typing import TypeAlias

import torch

# Runs once and returns its outputs. Nothing in it may read a result back: it is captured in a CUDA graph.
Contender: TypeAlias = Callable[[], object]

PYRALIS, STOCK, COMPILED, LIGER, BITSANDBYTES = "pyralis", "torch", "torch.compile", "liger", "bitsandbytes"
BASE = "base GEMMs"  # without what is measured: others are shown with their cost on top of it
PEERS = (STOCK, COMPILED, LIGER, BITSANDBYTES)


@dataclass(frozen=True, slots=True)
class ModelShape:
    """The sizes of a decoder that its ops see."""

    name: str
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int


SHAPES = {
    shape.name: shape
    for shape in (
        ModelShape("llama3-8b", 4096, 14336, 32, 8, 128, 128256),
        ModelShape("qwen2-7b", 3584, 18944, 28, 4, 128, 152064),
        ModelShape("tiny", 96, 200, 4, 2, 16, 300),  # for trying the benchmarks themselves
    )
}


@dataclass(frozen=True, slots=True)
class BenchCase:
    """An op at one size.

    `contenders(device)` makes fresh random inputs and returns what runs on them, by name; it is called several times,
    so that timings rotate among inputs. `bytes` and `flops` are the fewest that must move and be multiplied.
    """

    op: str
    shape: str
    tokens: int
    contenders: Callable[[torch.device], dict[str, Contender]]
    bytes: int
    flops: int = 0
    dtype: torch.dtype = torch.bfloat16


compiling: ContextVar[bool] = ContextVar("compiling", default=True)


def compiled(function: Callable) -> Callable:
    """`torch.compile(function)`, made once for all inputs; each size is compiled for itself, as its default would.

    The function itself while `compiling` is off, for a run without that peer.
    """
    return _compiled(function) if compiling.get() else function


@cache
def _compiled(function: Callable) -> Callable:
    return torch.compile(function, dynamic=False)


def has(package: str) -> bool:
    return find_spec(package) is not None


def backward_of(function: Callable, inputs: tuple[torch.Tensor, ...], *grads: torch.Tensor) -> Contender:
    """The backward alone of a differentiable function, run once forward here."""
    leaves = [tensor.detach().requires_grad_() for tensor in inputs]
    outputs = function(*leaves)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    return lambda: torch.autograd.grad(outputs, leaves, grads, retain_graph=True)
