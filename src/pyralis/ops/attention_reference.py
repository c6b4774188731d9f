"""Attention in readable torch: every score and a mask. Shapes as in `attention_spec.py`."""

from __future__ import annotations

import torch
from torch import Tensor

from pyralis.ops._triton import at_least_float32
from pyralis.ops.attention_spec import AttentionLayout, AttentionSpec


def visible(spec: AttentionSpec, layout: AttentionLayout, device: torch.device) -> Tensor:
    """[S, S] bool, [S, K] with shared keys: query i sees key j."""
    position = torch.arange(layout.seq, device=device)
    keys = position
    if layout.shared is not None:  # counted from the end of the sequence
        assert layout.cu_seqlens is not None
        position = position - layout.cu_seqlens[1:][layout.documents()]
        keys = (
            torch.arange(len(layout.shared.rows), device=device) - layout.shared.cu_seqlens[1:][layout.key_documents()]
        )
    distance = position[:, None] - keys[None, :]
    mask = distance >= 0 if spec.causal else torch.ones_like(distance, dtype=torch.bool)
    if spec.window is not None:
        mask &= distance < spec.window
    if layout.cu_seqlens is not None:
        mask &= layout.documents()[:, None] == layout.key_documents()[None, :]
    return mask


def reference(q: Tensor, k: Tensor, v: Tensor, spec: AttentionSpec, layout: AttentionLayout) -> Tensor:
    """[T, H * D], by explicit scores and masks, with the roundings of stock transformers' eager attention. k and v are
    [T, G * D], or [K, G * D] with shared keys.

    Differentiable; float64 in, float64 out. Source of the maths: Vaswani et al., Attention Is All You Need (2017),
    equation 1; Ainslie et al., GQA (2023).
    """
    B, S, G, R, D = layout.batch, layout.seq, spec.num_kv_heads, spec.group, spec.head_dim
    queries = q.view(B, S, G, R, D).permute(0, 2, 3, 1, 4).reshape(B, G, R * S, D)
    keys, values = (t.view(B, -1, G, D).transpose(1, 2) for t in (k, v))
    scores = (queries @ keys.transpose(2, 3)) * spec.scale
    if spec.softcap is not None:
        scores = torch.tanh(scores / spec.softcap) * spec.softcap
    scores = scores.view(B, G, R, S, -1).masked_fill(~visible(spec, layout, q.device), -torch.inf)
    weights = scores.softmax(-1, dtype=at_least_float32(q.dtype)).to(q.dtype)
    out = weights.view(B, G, R * S, -1) @ values
    return out.view(B, G, R, S, D).permute(0, 3, 1, 2, 4).reshape(B * S, G * R * D)
