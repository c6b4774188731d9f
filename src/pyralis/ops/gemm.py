"""Matrix products and sums in half precision whose results stay in float32."""

from __future__ import annotations

import torch
from torch import Tensor

from pyralis.ops._triton import at_least_float32


def gemm(out: Tensor, a: Tensor, b: Tensor, alpha: float, accumulate: bool) -> None:
    """out (+)= alpha a b, summed in out's dtype: float32 gradients of half-precision operands.

    Half-precision gradients of operands in another dtype (adapters that were cast) are summed in float32 first.
    """
    beta = 1 if accumulate else 0
    wide = at_least_float32(a.dtype)
    if out.dtype == a.dtype:
        out.addmm_(a, b, beta=beta, alpha=alpha)
    elif out.dtype != wide:
        total = torch.empty(out.shape, dtype=wide, device=out.device)
        gemm(total, a, b, alpha, False)
        if accumulate:
            out.add_(total)
        else:
            out.copy_(total)
    elif out.device.type == "cuda" and torch.version.hip is None:
        torch.addmm(out, a, b, out_dtype=out.dtype, beta=beta, alpha=alpha, out=out)
    else:
        out.addmm_(a.to(out.dtype), b.to(out.dtype), beta=beta, alpha=alpha)


def column_sums(dy: Tensor, out: Tensor, accumulate: bool) -> None:
    """out [N] (+)= the sum of dy [T, N] over tokens, in out's dtype."""
    if accumulate:
        out.add_(dy.sum(0, dtype=out.dtype))
    else:
        torch.sum(dy, 0, dtype=out.dtype, out=out)
