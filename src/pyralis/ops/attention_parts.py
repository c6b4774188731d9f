"""What the attention backends share: their shape, the saved state and views of heads. Shapes: `attention_spec.py`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pyralis.ops.attention_spec import AttentionLayout, AttentionSpec

State = Mapping[str, Any]
Gradients = tuple[Tensor, Tensor, Tensor]


@dataclass(frozen=True, slots=True)
class Saved:
    """What a backward needs. Tensors are kept, not copied; `state` is the backend's own."""

    backend: str
    spec: AttentionSpec
    layout: AttentionLayout
    q: Tensor  # [T, H * D]
    k: Tensor  # [T, G * D]; a backend gets [K, G * D] of shared keys
    v: Tensor
    out: Tensor  # [T, H * D]
    state: State


@dataclass(frozen=True, slots=True)
class Backend:
    """forward: q [T, H * D] and k, v [T, G * D], rows of any stride -> (output [T, H * D], state for the backward)."""

    forward: Callable[[Tensor, Tensor, Tensor, AttentionSpec, AttentionLayout], tuple[Tensor, State]]
    backward: Callable[[Tensor, Saved], Gradients]


def by_autograd(function: Callable[[Tensor, Tensor, Tensor, AttentionSpec, AttentionLayout], Tensor]) -> Backend:
    """A backend of a differentiable function: its graph, cut off from the caller's, is the state (for one backward)."""

    def forward(q: Tensor, k: Tensor, v: Tensor, spec: AttentionSpec, layout: AttentionLayout) -> tuple[Tensor, State]:
        q, k, v = (t.detach().requires_grad_() for t in (q, k, v))
        with torch.enable_grad():
            result = function(q, k, v, spec, layout)
        return result.detach(), {"leaves": (q, k, v), "result": result}

    def backward(dout: Tensor, saved: Saved) -> Gradients:
        dq, dk, dv = torch.autograd.grad(saved.state["result"], saved.state["leaves"], dout)
        return dq, dk, dv

    return Backend(forward, backward)


def heads(t: Tensor, spec: AttentionSpec, layout: AttentionLayout) -> Tensor:
    """[T, N * D] -> [B, S, N, D], a view."""
    return t.view(layout.batch, -1, t.shape[1] // spec.head_dim, spec.head_dim)


def rows(t: Tensor) -> Tensor:
    """[..., N, D] -> [T, N * D], a view unless the kernel laid it out otherwise."""
    return t.reshape(-1, t.shape[-2] * t.shape[-1])


def repeated(t: Tensor, spec: AttentionSpec, layout: AttentionLayout) -> Tensor:
    """[T, G * D] -> [B, S, H, D]: each key/value head once per query head of its group; a copy unless H = G."""
    kv = heads(t, spec, layout)
    if spec.group == 1:
        return kv
    return kv.unsqueeze(3).expand(-1, -1, -1, spec.group, -1).reshape(*kv.shape[:2], spec.num_heads, -1)


def summed(grad: Tensor, spec: AttentionSpec) -> Tensor:
    """[..., H, D] -> [T, G * D]: the gradient of `repeated`."""
    if spec.group == 1:
        return rows(grad)
    return rows(grad.reshape(-1, spec.num_kv_heads, spec.group, spec.head_dim).sum(2))
