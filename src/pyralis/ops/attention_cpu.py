"""Torch's FlashAttention for CPUs; packed sequences one by one. Shapes as in `attention_spec.py`."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from pyralis.ops._aten import aten
from pyralis.ops.attention_parts import Backend, Gradients, Saved, State, heads, repeated, rows, summed
from pyralis.ops.attention_reference import visible
from pyralis.ops.attention_spec import AttentionLayout, AttentionSpec


def _calls(layout: AttentionLayout) -> list[tuple[slice, slice, AttentionLayout]]:
    """Queries, keys and layout of each call: all at once, or one call a sequence."""
    if layout.cu_seqlens is None or layout.key_cu_seqlens is None:
        return [(slice(0, layout.tokens), slice(0, layout.tokens), layout)]
    bounds = zip(pairwise(layout.cu_seqlens.tolist()), pairwise(layout.key_cu_seqlens.tolist()))
    return [(slice(a, b), slice(c, d), AttentionLayout.padded(1, b - a)) for (a, b), (c, d) in bounds if a < b]


def _arguments(q: Tensor, k: Tensor, v: Tensor, spec: AttentionSpec, layout: AttentionLayout) -> dict[str, Any]:
    keys, before = AttentionLayout.padded(layout.batch, len(k) // layout.batch), (len(k) - len(q)) // layout.batch
    spec = spec.within(keys.seq)
    mask = None
    if spec.window is not None or (before and spec.causal):
        hidden = ~visible(spec, keys, q.device)[before:]
        mask = torch.zeros(hidden.shape, dtype=q.dtype, device=q.device).masked_fill_(hidden, -torch.inf)
    tensors = (heads(q, spec, layout), repeated(k, spec, layout), repeated(v, spec, layout))
    return {
        **dict(zip(("query", "key", "value"), (t.transpose(1, 2) for t in tensors))),
        "dropout_p": 0.0, "is_causal": spec.causal and mask is None, "attn_mask": mask, "scale": spec.scale,
    }  # fmt: skip


def _forward(q: Tensor, k: Tensor, v: Tensor, spec: AttentionSpec, layout: AttentionLayout) -> tuple[Tensor, State]:
    out = torch.zeros(q.shape, dtype=q.dtype, device=q.device)
    states = []
    for part, keys, call in _calls(layout):
        given = _arguments(q[part], k[keys], v[keys], spec, call)
        results = aten("_scaled_dot_product_flash_attention_for_cpu")(given)
        out[part] = rows(results.pop("output").transpose(1, 2))
        states.append(results)
    return out, {"calls": states}


def _backward(dout: Tensor, saved: Saved) -> Gradients:
    spec = saved.spec
    dq, dk, dv = (torch.zeros(t.shape, dtype=t.dtype, device=t.device) for t in (saved.q, saved.k, saved.v))
    for (part, keys, call), state in zip(_calls(saved.layout), saved.state["calls"]):
        given = _arguments(saved.q[part], saved.k[keys], saved.v[keys], spec, call)
        given["grad_out"], given["out"] = (heads(t[part], spec, call).transpose(1, 2) for t in (dout, saved.out))
        grads = aten("_scaled_dot_product_flash_attention_for_cpu_backward")(given, state)
        query, key, value = (g.transpose(1, 2) for g in grads.values())
        dq[part], dk[keys], dv[keys] = rows(query), summed(key, spec), summed(value, spec)
    return dq, dk, dv


FLASH_CPU = Backend(_forward, _backward)
