"""Linear layers with LoRA or DoRA as one differentiable function, and the reference: PEFT's own arithmetic.

Shapes and layout as in `lora_group.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from pyralis.ops._triton import at_least_float32
from pyralis.ops.dora import dora_backward, dora_forward, norms_and_ratio
from pyralis.ops.dropout_mask import advance
from pyralis.ops.dropout_mask import reference as keep_mask
from pyralis.ops.lora import LoraGradients, lora_backward, lora_forward, lora_project
from pyralis.ops.lora_group import LoraGroup, combine_bias, stack_A, stack_B

Tensors = Sequence[Tensor | None]  # one a projection; None where it has none


def keep_masks(group: LoraGroup, rng: Tensor, stream: int, tokens: int) -> list[Tensor | None]:
    """The masks [T, K] that the next call with `rng` and `stream` will use; for `reference`."""
    masks: list[Tensor | None] = [None] * len(group.projections)
    for index, j in enumerate(group.adapted):
        if threshold := group.projections[j].threshold:
            masks[j] = keep_mask(rng, stream + index, tokens, group.in_features, threshold)
    return masks


def reference(
    x: Tensor,
    weight: Tensor,
    group: LoraGroup,
    A: Tensors,
    B: Tensors,
    *,
    bias: Tensors | None = None,
    lora_bias: Tensors | None = None,
    magnitude: Tensors | None = None,
    masks: Tensors | None = None,
) -> Tensor:
    """y [..., N] as PEFT computes and rounds it; x [..., K], weight [N, K], masks bool [T, K]; float64 in and out."""
    nothing: Tensors = [None] * len(group.projections)
    bias, lora_bias, masks = bias or nothing, lora_bias or nothing, masks or nothing
    outputs = []
    for j, projection in enumerate(group.projections):
        W, a, b, mask, scale = weight[group.rows[j], : group.in_features], A[j], B[j], masks[j], projection.scale
        y = F.linear(x, W, bias[j])
        if a is not None and b is not None:
            xd = x
            if mask is not None:
                kept = torch.where(mask.view(x.shape), x, 0).to(at_least_float32(x.dtype))
                xd = (kept * projection.keep_scale).to(x.dtype)
            lora = F.linear(F.linear(xd, a.to(x.dtype)), b.to(x.dtype), lora_bias[j])
            if magnitude is None:
                y = y + lora * scale
            else:
                m = magnitude[j]
                assert m is not None
                delta = (b.to(x.dtype) @ a.to(x.dtype)).detach()
                ratio = m / torch.linalg.norm(W + scale * delta, dim=1)
                y = y + ((ratio - 1) * F.linear(xd, W) + ratio * lora * scale).to(x.dtype)
        outputs.append(y)
    return torch.cat(outputs, -1)


def _place(group: LoraGroup, weight: Tensor, A: Tensor, B: Tensors) -> None:
    """Write the adapter into the columns and rows that `weight` has for it."""
    N, K = group.out_features, group.in_features
    if weight.shape[1] > K:
        stack_B(group, B, weight[:N, K:])
    if len(weight) > N:
        weight[N:, :K] = A


class _LoraLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, group: LoraGroup, rng: Tensor | None, stream: int, weight: Tensor, x: Tensor,
        *parameters: Tensor | None,
    ) -> Tensor:  # fmt: skip
        n, K = len(group.projections), group.in_features
        A, B, bias, lora_bias, magnitude = (parameters[i * n : (i + 1) * n] for i in range(5))
        rows = x.reshape(-1, K)
        stacked = stack_A(group, A, rows.new_empty(group.pad, K))
        cast = [None if b is None else b.to(x.dtype) for b in B]
        _place(group, weight, stacked, cast)
        total_bias = combine_bias(group, bias, lora_bias, x.dtype)
        drawn = None
        if rng is not None and group.has_dropout:
            drawn = rng.clone()
            advance(rng)
        norm = ratio = u = None
        if group.dora:
            norm, ratio = norms_and_ratio(group, weight, stacked, magnitude, cast)
        x_wide = rows.new_empty(len(rows), group.width)
        x_wide[:, :K] = rows
        xa = lora_project(group, x_wide, stacked, rng=drawn, stream=stream)[:, : group.rank].contiguous()
        if ratio is not None:
            y, u = dora_forward(group, x_wide, weight, ratio, B=cast, bias=total_bias, rng=drawn, stream=stream)
        else:
            y = lora_forward(group, x_wide, weight, B=cast, bias=total_bias)
        ctx.save_for_backward(rows, xa, stacked, drawn, norm, ratio, u, *cast)
        ctx.weight = weight  # not among the saved: another call may write its own adapter into it meanwhile
        ctx.group, ctx.stream, ctx.x_shape = group, stream, x.shape
        ctx.dtypes = [None if p is None else p.dtype for p in parameters]
        return y.view(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        group, weight = ctx.group, ctx.weight
        x, xa, A, rng, norm, ratio, u, *B = ctx.saved_tensors
        n = len(group.projections)
        dy = grad.reshape(len(x), -1)
        needed = ctx.needs_input_grad[5:]
        dtype = at_least_float32(x.dtype)
        grads = LoraGradients.empty(group, x.device, bias=any(needed[2 * n : 4 * n]), dtype=dtype)
        dm = torch.empty(group.out_features, dtype=dtype, device=x.device) if any(needed[4 * n :]) else None
        _place(group, weight, A, B)
        if group.dora:
            dx, _ = dora_backward(
                group, dy, u, weight, x, xa, A, ratio, norm, grads, dm, B=B, rng=rng, stream=ctx.stream
            )  # fmt: skip
        else:
            dx = lora_backward(group, dy, weight, x, xa, A, grads, B=B, rng=rng, stream=ctx.stream)
        found: list[Tensor | None] = []
        for i in range(5 * n):
            kind, j = divmod(i, n)
            rows, value = group.rows[j], None
            if needed[i]:
                whole = (grads.A, None, grads.bias, grads.bias, dm)[kind]
                if kind == 1:
                    value = grads.B[j]
                elif whole is not None:
                    value = whole[group.columns[j] if kind == 0 else rows]
                    value = value * group.projections[j].scale if kind == 3 else value
            found.append(None if value is None else value.to(ctx.dtypes[i]))
        return None, None, None, None, dx.reshape(ctx.x_shape), *found


def lora_linear(
    x: Tensor,
    weight: Tensor,
    group: LoraGroup,
    A: Tensors,
    B: Tensors,
    *,
    bias: Tensors | None = None,
    lora_bias: Tensors | None = None,
    magnitude: Tensors | None = None,
    rng: Tensor | None = None,
    stream: int = 0,
) -> Tensor:
    """y [..., N] of all projections; differentiable in x and in every parameter but the frozen weight.

    x: [..., K]. weight: [N or N + P, K or K + P]; columns after K and rows after N are overwritten with B and A.
    A[j] [r_j, K], B[j] [N_j, r_j], bias[j], lora_bias[j] and magnitude[j] [N_j]: any float dtype (float32 masters get
    float32 gradients), cast to x's. rng: `new_rng`, advanced by the call; None switches dropout off.
    Raises ValueError where shapes contradict the group, or weight wants a gradient.
    """
    n = len(group.projections)
    if weight.requires_grad:
        raise ValueError("lora_linear got a weight that requires a gradient; the base weight must be frozen")
    rows, columns = (group.out_features, group.height), (group.in_features, group.width)
    if weight.shape[0] not in rows or weight.shape[1] not in columns:
        raise ValueError(
            f"weight is {list(weight.shape)}, the group expects {list(rows[:1] + columns[:1])}, "
            f"with LoRA columns or rows up to {list(rows[1:] + columns[1:])}"
        )
    if group.dora != (magnitude is not None):
        raise ValueError("magnitude vectors are given exactly for a group with dora=True")
    if group.dora and lora_bias is not None:
        raise ValueError("DoRA has no lora_bias, as in PEFT; leave it out")
    for j, (p, a, b) in enumerate(zip(group.projections, A, B, strict=True)):
        shapes = None if a is None or b is None else (tuple(a.shape), tuple(b.shape))
        expected = ((p.rank, group.in_features), (p.out_features, p.rank)) if p.rank else None
        if shapes != expected:
            raise ValueError(f"A and B of projection {j} have shapes {shapes}, its rank {p.rank} expects {expected}")
    nothing: Tensors = [None] * n
    return _LoraLinear.apply(
        group, rng, stream, weight, x, *A, *B, *(bias or nothing), *(lora_bias or nothing), *(magnitude or nothing)
    )
