"""LoRA inside the base GEMM: y = x W^T + b + s dropout(x) A^T B^T as [x | s xA^T] @ [W | B]^T.

The layout and its letters are described in `lora_group.py`. For a hand-written layer backward:

    lora_project(...)     x_wide[:, K:] = s dropout(x) A^T            one GEMM (or the dropout kernel)
    lora_forward(...)     y = x_wide @ [W | B]^T + ...                one GEMM
    lora_backward(...)    t = s dy B, dB, dx = [dy | t] @ [[W], [A]], dA = t^T x, dbias

What multiplies by a scale does so in a GEMM's float32 epilogue, where it costs no rounding. Gradients of A and B are
float32 whatever the operands are. With `weight` of K columns instead of K + P the B_j are given and multiplied one by
one (`concatenates` says when). With N rows instead of N + P, and wherever dropout is on, whose masks lie between t A
and dx, t A is written first and the GEMM adds to it: dx is then written once more and read once, where adding to it
after the GEMM would take another pass. `lora_linear.py` makes a differentiable function of these, and holds the
reference.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pyralis.ops.gemm import column_sums, gemm
from pyralis.ops.lora_dropout import project, project_backward
from pyralis.ops.lora_grad_b import grad_B
from pyralis.ops.lora_group import LoraGroup
from pyralis.ops.lora_weight import LoraWeight

ADDS_IN_GEMM = True  # t A comes before the GEMM, which adds to it; False: after it, by a pass of its own


@dataclass(frozen=True, slots=True)
class LoraGradients:
    """Where gradients go, float32, any of them None where nothing is trained; `accumulate` adds instead of writing.

    A [R, K] stacked as the group stacks it (rows of neighbouring parameters of a flat buffer); B[j] [N_j, r_j];
    bias [N]: of b. The gradient of lora_bias_j is s_j times its rows.
    """

    A: Tensor | None = None
    B: Sequence[Tensor | None] = ()
    bias: Tensor | None = None
    accumulate: bool = False

    @classmethod
    def empty(cls, group: LoraGroup, device: torch.device, *, bias: bool = False, dtype: torch.dtype) -> LoraGradients:
        """Buffers for everything a group can train; `dtype` float32 but for float64 tests."""
        return cls(
            torch.empty((group.rank, group.in_features), dtype=dtype, device=device),
            [torch.empty((p.out_features, p.rank), dtype=dtype, device=device) for p in group.projections],
            torch.empty(group.out_features, dtype=dtype, device=device) if bias else None,
        )


def lora_project(
    group: LoraGroup,
    x_wide: Tensor,
    A: Tensor,
    *,
    rng: Tensor | None = None,
    stream: int = 0,
    workspace: Tensor | None = None,
) -> Tensor:
    """Fill the LoRA columns of x_wide [T, K + P], whose first K hold x, with s dropout(x) A^T; returns them [T, P].

    A: [P, K] as `stack_A` makes it, or its first R rows. rng: None for no dropout; else see `lora_dropout.py`, where
    `stream` (group.adapted many are used) and the workspace [T, K] are described.
    """
    x, xa = x_wide.split_with_sizes((group.in_features, group.pad), 1)
    runs = group.runs
    if len(runs) == 1 and (rng is None or not group.has_dropout) and len(A) == group.pad:
        xa.addmm_(x, A.t(), beta=0, alpha=runs[0].like.scale)  # the zero rows of A fill the columns after R
        return xa
    for run in runs:
        part = run.columns
        if rng is not None and run.like.threshold:
            project(run, x, A[part], rng, stream + run.first, xa[:, part], workspace)
        else:
            xa[:, part].addmm_(x, A[part].t(), beta=0, alpha=run.like.scale)
    if group.pad > group.rank:
        xa[:, group.rank :].zero_()
    return xa


def lora_forward(
    group: LoraGroup,
    x_wide: Tensor,
    weight: Tensor | LoraWeight,
    *,
    B: Sequence[Tensor | None] | None = None,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """y [T, N] = x W^T + xa B^T + bias + residual from x_wide [T, K + P] with its LoRA columns filled.

    weight: [N or N + P, K + P] with B in it, or of K columns with B given; rows after N are not read. Or its views,
    which then have B. bias: [N], from `combine_bias`. residual: [T, N], added before the sum is rounded; it may be
    `out`. out: [T, N], any row stride.
    """
    w = weight if isinstance(weight, LoraWeight) else LoraWeight.of(group, weight, B)
    K, depth = group.in_features, w.across.shape[0]
    x = x_wide if x_wide.shape[1] == depth else x_wide[:, :depth]
    start = bias if residual is None else residual
    y = torch.mm(x, w.across, out=out) if start is None else torch.addmm(start, x, w.across, out=out)
    if residual is not None and bias is not None:
        y.add_(bias)
    if depth == K and group.rank:
        xa = x_wide[:, K:]
        for j in group.adapted:
            y[:, group.rows[j]].addmm_(xa[:, group.columns[j]], w.given_B(j).t())
    return y


def lora_backward(
    group: LoraGroup,
    dy: Tensor,
    weight: Tensor | LoraWeight,
    x: Tensor,
    xa: Tensor,
    A: Tensor,
    gradients: LoraGradients,
    *,
    B: Sequence[Tensor | None] | None = None,
    dy_wide: Tensor | None = None,
    t: Tensor | None = None,
    dx: Tensor | None = None,
    rng: Tensor | None = None,
    stream: int = 0,
    workspace: Tensor | None = None,
    filled: bool = False,
) -> Tensor:
    """The gradient of x [T, K], in `dx` if given; fills `gradients`.

    dy [T, N]; x [T, K] may have been computed anew, and is not read where gradients.A is None; xa [T, P or R] is what
    `lora_project` returned; A, B, weight, rng and stream as in the forward, with rng holding what it held then. All of
    any row stride. weight: of N + P rows where A [P, K] lies in the last ones; or its views, which then have B.
    dy_wide [T, N + P]: for [dy | t], where dy may lie already; made by default where weight has A's rows and dropout is
    off, not used elsewhere: there t [T, P] is where s dy B goes. dA = t^T x can be made later of either. filled: t and
    the gradients of B are there already (`glu_lora.py`), and dy in dy_wide.
    """
    w = weight if isinstance(weight, LoraWeight) else LoraWeight.of(group, weight, B)
    T, N, K = dy.shape[0], group.out_features, group.in_features
    if dx is None:
        dx = torch.empty((T, K), dtype=x.dtype, device=x.device)
    if gradients.bias is not None:
        column_sums(dy, gradients.bias, gradients.accumulate)
    if not group.rank:
        return torch.mm(dy, w.W, out=dx)
    dropout = rng is not None and group.has_dropout
    in_one = w.down is not None and not dropout
    copy = None
    if in_one:
        if dy_wide is None:
            dy_wide = torch.empty((T, N + group.pad), dtype=dy.dtype, device=dy.device)
        if dy_wide.data_ptr() != dy.data_ptr():
            copy = dy_wide[:, :N]
        t = dy_wide[:, N:]
    elif t is None:
        t = torch.empty((T, group.pad), dtype=dy.dtype, device=dy.device)
    assert w.B is not None, "a weight without LoRA columns needs B"
    if not filled:
        grad_B(group, dy, w.B, xa, t, gradients.B, dropout=dropout, accumulate=gradients.accumulate, copy=copy)
    if in_one:
        assert dy_wide is not None
        assert w.down is not None
        torch.mm(dy_wide, w.down, out=dx)
    else:
        W, A = w.W, A[: group.pad]
        if not ADDS_IN_GEMM:
            torch.mm(dy, W, out=dx)
        if rng is None or not dropout:
            dx.addmm_(t[:, : len(A)], A, beta=0 if ADDS_IN_GEMM else 1)
        else:
            _through_dropout(group, t, x, A, gradients, dx, rng, stream, workspace)
        if ADDS_IN_GEMM:
            dx.addmm_(dy, W)
    if not dropout and gradients.A is not None:
        gemm(gradients.A, t[:, : group.rank].t(), x, 1.0, gradients.accumulate)
    return dx


def _through_dropout(
    group: LoraGroup, t: Tensor, x: Tensor, A: Tensor, gradients: LoraGradients, dx: Tensor, rng: Tensor, stream: int,
    workspace: Tensor | None,
) -> None:  # fmt: skip
    """dA, and t A under the masks into dx."""
    added = not ADDS_IN_GEMM
    for run in group.runs:
        part = run.columns
        dA = None if gradients.A is None else gradients.A[part]
        if run.like.threshold:
            project_backward(
                run, t[:, part], x, A[part], rng, stream + run.first, dx, dA,
                add_dx=added, accumulate=gradients.accumulate, workspace=workspace,
            )  # fmt: skip
        else:
            dx.addmm_(t[:, part], A[part], beta=1 if added else 0)
            if dA is not None:
                gemm(dA, t[:, part].t(), x, 1.0, gradients.accumulate)
        added = True
