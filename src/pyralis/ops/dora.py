"""DoRA: LoRA with a trained magnitude for every output feature, as PEFT computes it.

    norm_i = ||W_i + s (B A)_i||                              a constant for the backward
    u      = xd W^T + s xd A^T B^T        xd = dropout(x)     (x itself without dropout)
    y      = b + x W^T + (m / norm - 1) (xd W^T) + (m / norm) s xd A^T B^T
           = b + (m / norm) u                                 without dropout: one GEMM, then one pass over y
    dm     = sum over tokens of dy u / norm

With dropout each projection multiplies W by its own xd once more, in the forward and in the backward; PEFT pays the
same. It then runs on `weight`'s first K columns and B apart. Rows of projections without adapter have m / norm = 1.

Shapes as in `lora_group.py`. Source of the maths: Liu et al., DoRA (2024), equations 5 and 11.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from pyralis.ops._triton import at_least_float32
from pyralis.ops.dropout_mask import masked
from pyralis.ops.gemm import column_sums, gemm
from pyralis.ops.lora import LoraGradients, lora_backward, lora_forward
from pyralis.ops.lora_group import LoraGroup

CHUNK_ELEMENTS = 1 << 24  # W + s B A is made 64 MiB of float32 at a time


def weight_norm(
    group: LoraGroup, weight: Tensor, A: Tensor, B: Sequence[Tensor | None], out: Tensor | None = None
) -> Tensor:
    """norm [N] float32 of the rows of W + s B A; 1 for projections without adapter. weight: as for `lora_forward`."""
    K = group.in_features
    dtype = at_least_float32(weight.dtype)
    norm = torch.empty(group.out_features, dtype=dtype, device=weight.device) if out is None else out
    norm.fill_(1)
    step = max(CHUNK_ELEMENTS // K, 1)
    for j in group.adapted:
        b, scale = B[j], group.projections[j].scale
        assert b is not None
        a, start = A[group.columns[j]].to(dtype), group.rows[j].start
        for first in range(0, len(b), step):
            rows = slice(start + first, start + min(first + step, len(b)))
            whole = torch.addmm(weight[rows, :K].to(dtype), b[first : first + step].to(dtype), a, alpha=scale)
            torch.linalg.vector_norm(whole, dim=1, out=norm[rows])
    return norm


def dora_forward(
    group: LoraGroup, x_wide: Tensor, weight: Tensor, ratio: Tensor, *,
    B: Sequence[Tensor | None] | None = None, bias: Tensor | None = None, out: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(y, u), both [T, N], without dropout. x_wide, weight and B as in `lora_forward`; ratio [N] float32: m / norm."""
    u = lora_forward(group, x_wide, weight, B=B)
    y = torch.empty_like(u) if out is None else out
    if bias is None:
        torch.mul(u, ratio, out=y)
    else:
        torch.addcmul(bias.to(ratio.dtype), u, ratio, out=y)
    return y, u


def dora_backward(
    group: LoraGroup, dy: Tensor, u: Tensor, weight: Tensor, x: Tensor, xa: Tensor, A: Tensor, ratio: Tensor,
    norm: Tensor, gradients: LoraGradients, dmagnitude: Tensor | None, *,
    B: Sequence[Tensor | None] | None = None, dx: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """dx [T, K] of `dora_forward`; fills `gradients` and dmagnitude [N] float32 (also with zeros' gradient where m is
    not trained: rows without adapter are to be ignored). A [T, N] buffer for dy m / norm is allocated."""
    _magnitude_gradient(dy, u, norm, dmagnitude, gradients.accumulate)
    if gradients.bias is not None:
        column_sums(dy, gradients.bias, gradients.accumulate)
    du = torch.mul(dy, ratio, out=torch.empty_like(u))
    scaled = LoraGradients(gradients.A, gradients.B, None, gradients.accumulate)
    return lora_backward(group, du, weight, x, xa, A, scaled, B=B, dx=dx)


def dora_dropout_forward(
    group: LoraGroup, x: Tensor, weight: Tensor, A: Tensor, B: Sequence[Tensor | None], ratio: Tensor,
    rng: Tensor, stream: int, bias: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """(y [T, N], u [T, N], xa [T, R]) with dropout. u is not written for projections without adapter."""
    W = weight[: group.out_features, : group.in_features]
    y = torch.mm(x, W.t()) if bias is None else torch.addmm(bias, x, W.t())
    u, xd = torch.zeros_like(y), torch.empty_like(x)
    xa = torch.empty((len(x), group.rank), dtype=x.dtype, device=x.device)
    for index, j in enumerate(group.adapted):
        rows, columns, projection, b = group.rows[j], group.columns[j], group.projections[j], B[j]
        assert b is not None
        masked(x, rng, stream + index, projection.threshold, xd, scale=projection.keep_scale)
        base = torch.mm(xd, W[rows].t())
        xa[:, columns].addmm_(xd, A[columns].t(), beta=0, alpha=projection.scale)
        torch.addmm(base, xa[:, columns], b.t(), out=u[:, rows])
        y[:, rows].add_(u[:, rows] * ratio[rows] - base)
    return y, u, xa


def dora_dropout_backward(
    group: LoraGroup, dy: Tensor, u: Tensor, weight: Tensor, x: Tensor, xa: Tensor, A: Tensor,
    B: Sequence[Tensor | None], ratio: Tensor, norm: Tensor, gradients: LoraGradients, dmagnitude: Tensor | None,
    rng: Tensor, stream: int,
) -> Tensor:  # fmt: skip
    """dx [T, K] of `dora_dropout_forward`; the rest as `dora_backward`."""
    W = weight[: group.out_features, : group.in_features]
    _magnitude_gradient(dy, u, norm, dmagnitude, gradients.accumulate)
    if gradients.bias is not None:
        column_sums(dy, gradients.bias, gradients.accumulate)
    dx, xd = torch.mm(dy, W), torch.empty_like(x)
    for index, j in enumerate(group.adapted):
        rows, columns, projection, b = group.rows[j], group.columns[j], group.projections[j], B[j]
        assert b is not None
        threshold, keep = projection.threshold, projection.keep_scale
        du = (dy[:, rows] * ratio[rows]).to(dy.dtype)
        if gradients.B and (dB := gradients.B[j]) is not None:
            gemm(dB, du.t(), xa[:, columns], 1.0, gradients.accumulate)
        g = torch.mm(du, b)
        if gradients.A is not None:
            masked(x, rng, stream + index, threshold, xd, scale=keep)
            gemm(gradients.A[columns], g.t(), xd, projection.scale, gradients.accumulate)
        torch.mm((dy[:, rows] * (ratio[rows] - 1)).to(dy.dtype), W[rows], out=xd)
        xd.addmm_(g, A[columns], alpha=projection.scale)
        masked(xd, rng, stream + index, threshold, dx, scale=keep, add=True)
    return dx


def _magnitude_gradient(dy: Tensor, u: Tensor, norm: Tensor, out: Tensor | None, accumulate: bool) -> None:
    """out [N] (+)= sum over tokens of dy u / norm, in float32, some rows at a time."""
    if out is None:
        return
    if not accumulate:
        out.zero_()
    step = max(CHUNK_ELEMENTS // dy.shape[1], 1)
    for first in range(0, len(dy), step):
        rows = slice(first, first + step)
        out.add_((dy[rows].to(out.dtype) * u[rows]).sum(0).div_(norm))
