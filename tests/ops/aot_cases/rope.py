"""Launches of rope to compile ahead of time."""

from __future__ import annotations

from collections.abc import Callable
from itertools import product

import torch

from pyralis.ops.rope import QKNorm, rope_backward, rope_forward, split_qkv
from tests.ops.aot import Case, meta

T = 4096
SHAPES = (  # q heads, k heads, head size, rotated, norms
    (32, 8, 128, 128, None),  # Llama 3
    (28, 4, 128, 128, None),  # Qwen2 7B
    (32, 8, 128, 128, False),  # Qwen3
    (8, 4, 256, 256, True),  # Gemma 3
    (24, 8, 128, 96, None),  # Phi-4-mini: partial
    (32, 32, 96, 96, None),  # Phi-3-mini
    (9, 3, 64, 64, None),  # SmolLM2
)


def _call(shape: tuple, dtype: torch.dtype, indexed: bool) -> Callable[[], None]:
    H, KV, D, R, normed = shape

    def call() -> None:
        q, k, _ = split_qkv(meta(T, (H + 2 * KV) * D, dtype=dtype), H, KV)
        cos, sin = meta(T, R, dtype=dtype), meta(T, R, dtype=dtype)
        positions = meta(T, dtype=torch.int64) if indexed else None
        norm = None if normed is None else QKNorm(meta(D, dtype=dtype), meta(D, dtype=dtype), 1e-6, normed)
        _, _, saved = rope_forward(q, k, cos, sin, positions=positions, norm=norm)
        for dweights in ((None, None), (meta(D, dtype=dtype), meta(D, dtype=dtype))):
            dq, dk, _ = split_qkv(meta(T, (H + 2 * KV) * D, dtype=dtype), H, KV)
            rope_backward(
                dq, dk, cos, sin, positions=positions, norm=norm, saved=saved,
                dq_weight=dweights[0], dk_weight=dweights[1],
            )  # fmt: skip
        wide = meta(T, (H + 2 * KV) * D + 64, dtype=dtype)[:, : (H + 2 * KV) * D]
        into_q, into_k, into_v = split_qkv(wide, H, KV)
        for v in ((None, None), (meta(T, KV, D, dtype=dtype), into_v)):
            rope_backward(
                dq, dk, cos, sin, positions=positions, norm=norm, saved=saved,
                dq_out=into_q, dk_out=into_k, dv=v[0], dv_out=v[1],
            )  # fmt: skip

    return call


def cases() -> list[Case]:
    dtypes = (torch.bfloat16, torch.float16, torch.float32)
    return [
        Case(f"{shape} {dtype} positions={indexed}", _call(shape, dtype, indexed))
        for shape, dtype, indexed in product(SHAPES, dtypes, (False, True))
    ]
