"""Rotary position embedding of q and k in one launch, with their RMS norms before it (Qwen3, Gemma 3).

    n = norm(x)                                        per head, rounded as in rms_norm; n = x without norms
    x'[:R/2]  = n[:R/2] * cos - n[R/2:R] * sin         the halves are paired, as Hugging Face does; columns R to D
    x'[R/2:R] = n[R/2:R] * cos + n[:R/2] * sin         (partial rotary) pass through

Stock rounds each product and the sum to the dtype; here the rotation is float32, rounded once. The backward is the
transposed rotation (sin negated, so it holds for scaled cos and sin too), then the norms'.

Shapes: T tokens, H heads (of q or k), D head size, R <= D rotated columns, C rows of the cos and sin tables.
Source of the maths: Su et al., RoFormer (2021), equation 34.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pyralis.ops._rope_kernels import HeadLaunch, backward_kernel, forward_kernel
from pyralis.ops._triton import at_least_float32, cdiv, launch, next_power_of_2, unsupported_tensors
from pyralis.ops.rms_norm import reference as rms_norm_reference


@dataclass(frozen=True, slots=True)
class QKNorm:
    """RMS norms of each head of q and k."""

    q_weight: Tensor  # [D]
    k_weight: Tensor  # [D]
    eps: float
    unit_offset: bool = False  # Gemma's rounding and 1 + weight


class QKNormSaved(NamedTuple):
    """What the backward of the norms reads."""

    q: Tensor  # [T, H, D], as they went in: they must not have been overwritten
    k: Tensor
    q_rstd: Tensor  # [T, H] float32
    k_rstd: Tensor


def split_qkv(qkv: Tensor, num_heads: int, num_kv_heads: int) -> tuple[Tensor, Tensor, Tensor]:
    """Views q [T, H, D], k and v [T, KV, D] of a fused projection's output [T, (H + 2 * KV) * D], any row stride."""
    heads = qkv.unflatten(-1, (num_heads + 2 * num_kv_heads, -1))
    q, k, v = heads.split((num_heads, num_kv_heads, num_kv_heads), -2)
    return q, k, v


def supported(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, *others: Tensor | None) -> str | None:
    """Why the kernels cannot take these tensors; None if they can."""
    if q.shape[-1] > 512:
        return f"head size {q.shape[-1]}, the kernels take at most 512"
    return unsupported_tensors(q, k, cos, sin, *others)


def _rows(table: Tensor, positions: Tensor | None, tokens: int) -> Tensor:
    """Each token's row of a table [C, R], as [T, 1, R]."""
    if positions is not None:
        return table[positions][:, None]
    return table.repeat(tokens // max(table.shape[0], 1), 1)[:, None]


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    rotated, rest = x[..., : cos.shape[-1]], x[..., cos.shape[-1] :]
    first, second = rotated.chunk(2, -1)
    turned = torch.cat((-second, first), -1)
    return torch.cat((rotated * cos + turned * sin, rest), -1)


def reference(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, *, positions: Tensor | None = None, norm: QKNorm | None = None
) -> tuple[Tensor, Tensor]:
    """(q', k') of the equations above, rounded as stock transformers rounds."""
    cos, sin = _rows(cos, positions, q.shape[0]), _rows(sin, positions, q.shape[0])
    if norm is not None:
        q = rms_norm_reference(q, norm.q_weight, norm.eps, unit_offset=norm.unit_offset)
        k = rms_norm_reference(k, norm.k_weight, norm.eps, unit_offset=norm.unit_offset)
    return _rotate(q, cos, sin), _rotate(k, cos, sin)


def _reference_backward(
    grad: Tensor, cos: Tensor, sin: Tensor, x: Tensor | None, rstd: Tensor | None, weight: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """(dx, dweight) of one of q and k in float32; `weight` has the unit offset in it."""
    dtype = at_least_float32(grad.dtype)
    g = _rotate(grad.to(dtype), cos.to(dtype), -sin.to(dtype))
    if x is None or rstd is None or weight is None:
        return g, None
    n = x.to(dtype) * rstd[..., None]
    dweight = (g * n).sum((0, 1))
    g = g * weight.to(dtype)
    return rstd[..., None] * (g - n * (g * n).mean(-1, keepdim=True)), dweight


def _check(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, positions: Tensor | None) -> None:
    assert q.dim() == k.dim() == 3, "q and k are [T, H, D]"
    assert q.shape[0] == k.shape[0], "q and k have the same tokens"
    assert cos.shape == sin.shape, "cos and sin are [C, R]"
    assert cos.dim() == 2, "cos and sin are [C, R]"
    assert cos.shape[1] % 2 == 0, "an even number of columns is rotated"
    assert cos.shape[1] <= q.shape[2], "at most D columns are rotated"
    if positions is None:
        assert q.shape[0] % max(cos.shape[0], 1) == 0, "tokens are whole sequences of cos's rows"
    else:
        assert positions.shape == q.shape[:1], "positions is [T]"
        assert positions.is_contiguous(), "positions is contiguous"


def rope_forward(
    q: Tensor,
    k: Tensor,
    cos: Tensor,
    sin: Tensor,
    *,
    positions: Tensor | None = None,
    norm: QKNorm | None = None,
    q_out: Tensor | None = None,
    k_out: Tensor | None = None,
) -> tuple[Tensor, Tensor, QKNormSaved | None]:
    """(q', k', what the norms' backward needs). No autograd.

    q: [T, H, D], k: [T, KV, D], any token and head stride (`split_qkv`; a transposed [B, H, S, D] for B = 1).
    cos, sin: [C, R] with equal halves, as Hugging Face makes them. Token t reads row positions[t] (int32 or int64
    [T]), or without positions row t % C: C = T for tables of each token, C = S for batches that share one.
    q_out, k_out: default in place without norms; new [T, H, D] with norms, whose backward reads q and k as they were.
    Passing q and k themselves works for both.
    """
    _check(q, k, cos, sin, positions)
    (T, H, D), KV = q.shape, k.shape[1]
    if q_out is None:
        q_out = q if norm is None else torch.empty((T, H, D), dtype=q.dtype, device=q.device)
    if k_out is None:
        k_out = k if norm is None else torch.empty((T, KV, D), dtype=k.dtype, device=k.device)
    saved = None
    if norm is not None:
        float_dtype = at_least_float32(q.dtype)
        saved = QKNormSaved(
            q, k,
            torch.empty((T, H), dtype=float_dtype, device=q.device),
            torch.empty((T, KV), dtype=float_dtype, device=q.device),
        )  # fmt: skip
    weights = (None, None) if norm is None else (norm.q_weight, norm.k_weight)
    if supported(q, k, cos, sin, q_out, k_out, *weights) is not None:
        if saved is not None and norm is not None:
            for x, rstd in ((q, saved.q_rstd), (k, saved.k_rstd)):
                rstd.copy_(torch.rsqrt(x.to(rstd.dtype).square().mean(-1) + norm.eps))
        new_q, new_k = reference(q, k, cos, sin, positions=positions, norm=norm)
        q_out.copy_(new_q)
        k_out.copy_(new_k)
        return q_out, k_out, saved
    R = cos.shape[1]
    plan = HeadLaunch.of(max(H, KV), R)
    q_blocks, k_blocks = cdiv(H, plan.heads), cdiv(KV, plan.heads)
    launch(
        forward_kernel, (T, q_blocks + k_blocks),
        q, k, q_out, k_out, cos, sin, positions, *weights,
        None if saved is None else saved.q_rstd, None if saved is None else saved.k_rstd,
        q.stride(0), q.stride(1), k.stride(0), k.stride(1),
        q_out.stride(0), q_out.stride(1), k_out.stride(0), k_out.stride(1), cos.stride(0), sin.stride(0),
        max(cos.shape[0], 1), 0.0 if norm is None else norm.eps,
        device=q.device, num_warps=plan.num_warps, Q_BLOCKS=q_blocks, HQ=H, HK=KV, HEADS=plan.heads, D=D, R=R,
        BLOCK_HALF=plan.block_half, BLOCK_REST=next_power_of_2(D - R),
        COPY_REST=norm is not None or q_out is not q or k_out is not k,
        UNIT_OFFSET=norm is not None and norm.unit_offset,
    )  # fmt: skip
    return q_out, k_out, saved


def rope_backward(
    dq: Tensor,
    dk: Tensor,
    cos: Tensor,
    sin: Tensor,
    *,
    positions: Tensor | None = None,
    norm: QKNorm | None = None,
    saved: QKNormSaved | None = None,
    dq_weight: Tensor | None = None,
    dk_weight: Tensor | None = None,
    dq_out: Tensor | None = None,
    dk_out: Tensor | None = None,
    dv: Tensor | None = None,
    dv_out: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Gradients with respect to q and k, of dq [T, H, D] and dk [T, KV, D] (any token and head stride).

    dq_out, dk_out: where they go, in shapes and dtype of dq and dk; by default in place.
    dv: [T, KV, D], copied to dv_out on the way, which spares the launch; dtype of dq, any token and head stride.
    norm and saved: as in and from the forward. dq_weight, dk_weight: [D], overwritten; None for frozen norms. With
    them a float32 workspace [T, head blocks, D] is allocated; its rows are summed in a fixed order.
    """
    _check(dq, dk, cos, sin, positions)
    assert (norm is None) == (saved is None), "norm and saved go together"
    assert (dv is None) == (dv_out is None), "dv and dv_out go together"
    if dv is not None and dv_out is not None:
        assert dv.shape == dv_out.shape == dk.shape, "dv and dv_out are [T, KV, D]"
        assert dv.dtype == dv_out.dtype == dq.dtype, "dv and dv_out have the dtype of dq"
    (T, H, D), KV, R = dq.shape, dk.shape[1], cos.shape[1]
    weights = (None, None) if norm is None else (norm.q_weight, norm.k_weight)
    q, k, q_rstd, k_rstd = (None, None, None, None) if saved is None else saved
    dq_out, dk_out = dq if dq_out is None else dq_out, dk if dk_out is None else dk_out
    if supported(dq, dk, cos, sin, q, k, dq_out, dk_out, dv, dv_out, *weights) is not None:
        if dv is not None and dv_out is not None:
            dv_out.copy_(dv)
        offset = norm is not None and norm.unit_offset
        cos, sin = _rows(cos, positions, T), _rows(sin, positions, T)
        for grad, out, x, rstd, weight, dweight in (
            (dq, dq_out, q, q_rstd, weights[0], dq_weight),
            (dk, dk_out, k, k_rstd, weights[1], dk_weight),
        ):
            scale = None if weight is None else weight.to(at_least_float32(weight.dtype)) + offset
            dx, grad_weight = _reference_backward(grad, cos, sin, x, rstd, scale)
            out.copy_(dx)
            if dweight is not None and grad_weight is not None:
                dweight.copy_(grad_weight)
        return dq_out, dk_out
    plan = HeadLaunch.of(max(H, KV), R)
    q_blocks, k_blocks = cdiv(H, plan.heads), cdiv(KV, plan.heads)
    v_heads = 0 if dv is None else plan.copied_heads(KV, D)
    v_blocks = 0 if dv is None else cdiv(KV, v_heads)
    partial = None
    if norm is not None and (dq_weight is not None or dk_weight is not None):
        partial = torch.empty((T, q_blocks + k_blocks, D), dtype=torch.float32, device=dq.device)
    launch(
        backward_kernel, (T, q_blocks + k_blocks + v_blocks),
        dq, dk, dv, dq_out, dk_out, dv_out, q, k, cos, sin, positions, *weights, q_rstd, k_rstd, partial,
        dq.stride(0), dq.stride(1), dk.stride(0), dk.stride(1),
        dq_out.stride(0), dq_out.stride(1), dk_out.stride(0), dk_out.stride(1),
        *((0, 0, 0, 0) if q is None or k is None else (q.stride(0), q.stride(1), k.stride(0), k.stride(1))),
        *((0, 0) if dv is None else dv.stride()[:2]), *((0, 0) if dv_out is None else dv_out.stride()[:2]),
        cos.stride(0), sin.stride(0), max(cos.shape[0], 1),
        device=dq.device, num_warps=plan.num_warps, Q_BLOCKS=q_blocks, BLOCKS=q_blocks + k_blocks, HQ=H, HK=KV,
        HEADS=plan.heads, V_HEADS=v_heads, BLOCK_V=0 if dv is None else next_power_of_2(D), D=D, R=R,
        BLOCK_HALF=plan.block_half, BLOCK_REST=next_power_of_2(D - R),
        COPY_REST=norm is not None or dq_out is not dq or dk_out is not dk,
        UNIT_OFFSET=norm is not None and norm.unit_offset,
    )  # fmt: skip
    if partial is not None:
        if dq_weight is not None:
            dq_weight.copy_(partial[:, :q_blocks].sum((0, 1)))
        if dk_weight is not None:
            dk_weight.copy_(partial[:, q_blocks:].sum((0, 1)))
    return dq_out, dk_out


class _Rope(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, q_weight: Tensor | None, k_weight: Tensor | None,
        cos: Tensor, sin: Tensor, positions: Tensor | None, eps: float, unit_offset: bool,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        norm = None if q_weight is None or k_weight is None else QKNorm(q_weight, k_weight, eps, unit_offset)
        q_out, k_out, saved = rope_forward(
            q, k, cos, sin, positions=positions, norm=norm,
            q_out=torch.empty(q.shape, dtype=q.dtype, device=q.device),
            k_out=torch.empty(k.shape, dtype=k.dtype, device=k.device),
        )  # fmt: skip
        ctx.save_for_backward(cos, sin, positions, q_weight, k_weight, *(saved or ()))
        ctx.norm = (eps, unit_offset)
        return q_out, k_out

    @staticmethod
    def backward(ctx: Any, dq: Tensor, dk: Tensor) -> tuple[Tensor | None, ...]:
        cos, sin, positions, q_weight, k_weight, *saved = ctx.saved_tensors
        norm = None if q_weight is None else QKNorm(q_weight, k_weight, *ctx.norm)
        weights = [
            torch.empty_like(weight) if needed else None
            for weight, needed in zip((q_weight, k_weight), ctx.needs_input_grad[2:4])
        ]
        dq, dk = rope_backward(
            dq.clone(memory_format=torch.contiguous_format), dk.clone(memory_format=torch.contiguous_format), cos, sin,
            positions=positions, norm=norm, saved=QKNormSaved(*saved) if saved else None,
            dq_weight=weights[0], dk_weight=weights[1],
        )  # fmt: skip
        return dq, dk, *weights, None, None, None, None, None


def rope(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, *, positions: Tensor | None = None, norm: QKNorm | None = None
) -> tuple[Tensor, Tensor]:
    """(q', k') in new tensors; arguments as in `rope_forward`. Differentiable in q, k and the norms' weights."""
    if norm is None:
        return _Rope.apply(q, k, None, None, cos, sin, positions, 0.0, False)
    return _Rope.apply(q, k, norm.q_weight, norm.k_weight, cos, sin, positions, norm.eps, norm.unit_offset)
