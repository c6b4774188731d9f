"""DoRA: LoRA with a trained magnitude for every output feature, as PEFT computes it.

    norm_i = ||W_i + s (B A)_i||                              a constant for the backward
    u      = xd W^T + s xd A^T B^T        xd = dropout(x)     (x itself without dropout)
    y      = b + x W^T + (m / norm - 1) (xd W^T) + (m / norm) s xd A^T B^T
           = b + (m / norm) u                                 without dropout: one GEMM, then one pass over y
    dm     = sum over tokens of dy u / norm

With dropout each projection multiplies W by its own xd once more, in the forward and in the backward; PEFT pays the
same. Rows of projections without adapter have m / norm = 1.

Shapes and layout as in `lora_group.py`, and what LoRA needs as in `lora.py`: x_wide with its LoRA columns filled,
weight or its views. Source of the maths: Liu et al., DoRA (2024), equations 5 and 11.
"""
# mypy: allow-untyped-defs, allow-incomplete-defs

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from pyralis.ops._triton import at_least_float32, cdiv, launch, next_power_of_2, tl, triton, unsupported_tensors
from pyralis.ops.dropout_mask import masked
from pyralis.ops.feature_scale import feature_scale, feature_scale_backward
from pyralis.ops.gemm import column_sums, gemm
from pyralis.ops.lora import LoraGradients, lora_backward, lora_forward
from pyralis.ops.lora_grad_b import grad_B
from pyralis.ops.lora_group import LoraGroup
from pyralis.ops.lora_weight import LoraWeight

Tensors = Sequence[Tensor | None]  # one a projection; None where it has none
NORM_ROWS = 4  # rows of W that a program goes over


def norms_and_ratio(
    group: LoraGroup, weight: Tensor | LoraWeight, A: Tensor, magnitude: Tensors, B: Tensors | None = None,
    *, norm: Tensor | None = None, ratio: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(norm, m / norm), [N] float32: norms of the rows of W + s B A. magnitude: m of each projection, [N_j].

    Rows of projections without adapter are left as they are, by default 1. W + s B A is never made. With w_i and b_i
    the rows of W and B,

        norm_i^2 = |w_i|^2 + b_i . (2 s A w_i + s^2 A A^T b_i)

    which reads W twice and costs what LoRA's product costs for r tokens. Its relative error is that of float32 times
    (|w_i|^2 + |s A^T b_i|^2) / norm_i^2, so near 1e-7 unless the two all but cancel.
    """
    w = weight if isinstance(weight, LoraWeight) else LoraWeight.of(group, weight, B)
    dtype, device = at_least_float32(w.W.dtype), w.W.device
    norm = torch.ones(group.out_features, dtype=dtype, device=device) if norm is None else norm
    ratio = torch.ones(group.out_features, dtype=dtype, device=device) if ratio is None else ratio
    for j in group.adapted:
        rows, scale, a, b, m = (
            group.rows[j],
            group.projections[j].scale,
            A[group.columns[j]],
            w.given_B(j),
            magnitude[j],
        )
        assert m is not None, f"projection {j} has a rank but no magnitude"
        gram = torch.empty((len(a), len(a)), dtype=dtype, device=device)
        gemm(gram, a, a.t(), scale * scale, False)
        crossed = torch.empty(b.shape, dtype=dtype, device=device)
        gemm(crossed, w.W[rows], a.t(), 2 * scale, False)
        crossed.addmm_(b.to(dtype), gram)
        _norm_rows(w.W[rows], crossed, b, m, norm[rows], ratio[rows])
    return norm, ratio


def _norm_rows(W: Tensor, crossed: Tensor, b: Tensor, m: Tensor, norm: Tensor, ratio: Tensor) -> None:
    """norm = sqrt(|w_i|^2 + b_i . crossed_i) and ratio = m / norm of rows [n], in one pass over W [n, K]."""
    if unsupported_tensors(W, crossed, b, m, norm, ratio) is not None:
        squares = torch.linalg.vector_norm(W, dim=1, dtype=norm.dtype).square_().add_((crossed * b).sum(1))
        torch.sqrt(squares.clamp_(min=0), out=norm)
        torch.div(m.to(norm.dtype), norm, out=ratio)
        return
    (n, K), rank = W.shape, b.shape[1]
    launch(
        _norm_kernel, (cdiv(n, NORM_ROWS),), W, crossed, b, m, norm, ratio, W.stride(0), b.stride(0),
        device=W.device, num_warps=4,
        N=n, K=K, RANK=rank, ROWS=NORM_ROWS, BLOCK_K=min(512, next_power_of_2(K)), BLOCK_R=next_power_of_2(rank),
    )  # fmt: skip


@triton.jit
def _norm_kernel(
    W, crossed, b, m, norm, ratio, W_stride, b_stride, N: tl.constexpr, K: tl.constexpr, RANK: tl.constexpr,
    ROWS: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    inside = row < N
    total = tl.zeros([ROWS, BLOCK_K], tl.float32)
    for first in range(0, K, BLOCK_K):
        col = first + tl.arange(0, BLOCK_K)
        mask = inside[:, None] & (col < K)[None, :]
        value = tl.load(W + row[:, None] * W_stride + col[None, :], mask=mask, other=0.0).to(tl.float32)
        total += value * value
    r = tl.arange(0, BLOCK_R)
    mask = inside[:, None] & (r < RANK)[None, :]
    c = tl.load(crossed + row[:, None] * RANK + r[None, :], mask=mask, other=0.0)
    c *= tl.load(b + row[:, None] * b_stride + r[None, :], mask=mask, other=0.0).to(tl.float32)
    length = tl.where(inside, tl.sqrt(tl.maximum(tl.sum(total, 1) + tl.sum(c, 1), 0.0)), 1.0)
    tl.store(norm + row, length, mask=inside)
    tl.store(ratio + row, tl.load(m + row, mask=inside, other=0.0).to(tl.float32) / length, mask=inside)


def dora_forward(
    group: LoraGroup, x_wide: Tensor, weight: Tensor | LoraWeight, ratio: Tensor, *, B: Tensors | None = None,
    bias: Tensor | None = None, residual: Tensor | None = None, out: Tensor | None = None,
    rng: Tensor | None = None, stream: int = 0,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(y + residual, u), both [T, N]. ratio [N] float32: m / norm. rng and stream: those that `lora_project` had."""
    w = weight if isinstance(weight, LoraWeight) else LoraWeight.of(group, weight, B)
    if rng is None or not group.has_dropout:
        u = lora_forward(group, x_wide, w)
        return feature_scale(u, ratio, bias=bias, residual=residual, out=out), u
    x, xa = x_wide.split_with_sizes((group.in_features, x_wide.shape[1] - group.in_features), 1)
    y = torch.mm(x, w.W.t(), out=out) if bias is None else torch.addmm(bias, x, w.W.t(), out=out)
    everywhere = len(group.adapted) == len(group.projections)
    u = (torch.empty if everywhere else torch.zeros)(y.shape, dtype=y.dtype, device=y.device)
    xd = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    for index, j in enumerate(group.adapted):
        rows, projection = group.rows[j], group.projections[j]
        masked(x, rng, stream + index, projection.threshold, xd, scale=projection.keep_scale)
        base, added = torch.mm(xd, w.W[rows].t()), torch.mm(xa[:, group.columns[j]], w.given_B(j).t())
        y[:, rows].add_(torch.addcmul(base * (ratio[rows] - 1), added, ratio[rows]))
        torch.add(base, added, out=u[:, rows])
    return y if residual is None else y.add_(residual), u


def dora_backward(
    group: LoraGroup, dy: Tensor, u: Tensor | None, weight: Tensor | LoraWeight, x: Tensor, xa: Tensor, A: Tensor,
    ratio: Tensor, norm: Tensor, gradients: LoraGradients, dmagnitude: Tensor | None, *, B: Tensors | None = None,
    dy_wide: Tensor | None = None, t: Tensor | None = None, dx: Tensor | None = None,
    rng: Tensor | None = None, stream: int = 0,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(dx [T, K], du [T, N]) of `dora_forward`; fills `gradients` and dmagnitude [N] float32, overwritten.

    u is read for dmagnitude alone, whose features without magnitude mean nothing. The rest as for `lora_backward`,
    where du takes the place of dy: du lies in dy_wide if that is given, and may then take dy's memory.
    """
    w = weight if isinstance(weight, LoraWeight) else LoraWeight.of(group, weight, B)
    dropout = rng is not None and group.has_dropout
    if gradients.bias is not None:
        column_sums(dy, gradients.bias, gradients.accumulate)
    place = None if dy_wide is None or dropout else dy_wide[:, : group.out_features]
    du = feature_scale_backward(dy, ratio, u, norm, dmagnitude, out=place)
    gradients = replace(gradients, bias=None)
    if rng is not None and dropout:
        dx = torch.mm(dy, w.W, out=dx)
        _through_dropout(group, dy, du, w, x, xa, A, ratio, gradients, t, dx, rng, stream)
        return dx, du
    return lora_backward(group, du, w, x, xa, A, gradients, dy_wide=dy_wide, t=t, dx=dx), du


def _through_dropout(
    group: LoraGroup, dy: Tensor, du: Tensor, w: LoraWeight, x: Tensor, xa: Tensor, A: Tensor, ratio: Tensor,
    gradients: LoraGradients, t: Tensor | None, dx: Tensor, rng: Tensor, stream: int,
) -> None:  # fmt: skip
    """Gradients of A and B, and what reaches x under the masks added to dx."""
    assert w.B is not None, "a weight without LoRA columns needs B"
    if t is None:
        t = torch.empty((len(dy), group.rank), dtype=dy.dtype, device=dy.device)
    grad_B(group, du, w.B, xa, t, gradients.B, dropout=True, accumulate=gradients.accumulate)
    xd = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    for index, j in enumerate(group.adapted):
        rows, columns, projection = group.rows[j], group.columns[j], group.projections[j]
        threshold = projection.threshold
        if gradients.A is not None:
            masked(x, rng, stream + index, threshold, xd)
            gemm(gradients.A[columns], t[:, columns].t(), xd, 1.0, gradients.accumulate)
        extra = feature_scale(dy[:, rows], ratio[rows] - 1)
        xd.addmm_(extra, w.W[rows], beta=0, alpha=projection.keep_scale).addmm_(t[:, columns], A[columns])
        masked(xd, rng, stream + index, threshold, dx, add=True)
