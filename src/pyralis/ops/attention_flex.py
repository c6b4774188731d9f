"""FlexAttention: softcaps, windows and packed sequences in one kernel that torch compiles at its first use.

Shapes as in `attention_spec.py`.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from pyralis.ops.attention_spec import AttentionLayout, AttentionSpec

# A version each for: the layer's window and softcap, padded and packed, dtype, gradients, fixed and variable lengths.
# Torch stops at 8 a process.
VERSIONS = 64


@lru_cache
def _compiled() -> tuple[Callable[..., Any], Callable[..., Any]]:
    from torch._dynamo import config
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    config.recompile_limit = max(config.recompile_limit, VERSIONS)
    # fullgraph: what cannot be compiled says why. Uncompiled, FlexAttention stores all scores, or fails.
    return torch.compile(flex_attention, fullgraph=True), torch.compile(create_block_mask)


def _mask(spec: AttentionSpec, documents: Tensor | None) -> Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]:
    window, causal = spec.window, spec.causal

    def sees(batch: Tensor, head: Tensor, i: Tensor, j: Tensor) -> Tensor:
        allowed = i >= j if causal else i == i
        if window is not None:
            allowed = allowed & (i - j < window)
        if documents is not None:
            allowed = allowed & (documents[i] == documents[j])
        return allowed

    return sees


def _capped(cap: float) -> Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]:
    def capped(score: Tensor, batch: Tensor, head: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return torch.tanh(score / cap) * cap

    return capped


@lru_cache(maxsize=64)
def _fixed_block_mask(spec: AttentionSpec, seq: int, device: torch.device) -> Any:
    return _compiled()[1](_mask(spec, None), None, None, seq, seq, device=device)


def _block_mask(spec: AttentionSpec, layout: AttentionLayout, device: torch.device) -> Any:
    """Which blocks of scores exist. That of a packed layout is made at each call: its sequences lie on the device."""
    if layout.cu_seqlens is not None:
        return _compiled()[1](_mask(spec, layout.documents()), None, None, layout.seq, layout.seq, device=device)
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():  # what is made here exists after a replay
        return _fixed_block_mask.__wrapped__(spec, layout.seq, device)
    return _fixed_block_mask(spec, layout.seq, device)


def flex(q: Tensor, k: Tensor, v: Tensor, spec: AttentionSpec, layout: AttentionLayout) -> Tensor:
    """[T, H * D], differentiable in q [T, H * D] and k, v [T, G * D]."""
    query, key, value = (t.view(layout.batch, layout.seq, -1, spec.head_dim).transpose(1, 2) for t in (q, k, v))
    out = _compiled()[0](
        query, key, value, score_mod=None if spec.softcap is None else _capped(spec.softcap),
        block_mask=_block_mask(spec, layout, q.device), scale=spec.scale, enable_gqa=spec.group > 1,
        kernel_options={"BACKEND": "TRITON"},  # the decoding kernel, taken below 128 rows, fails on packed masks
    )  # fmt: skip
    return out.transpose(1, 2).reshape(layout.tokens, -1)
