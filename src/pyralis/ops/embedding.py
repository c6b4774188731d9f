"""Rows of an embedding table, scaled as Gemma does, fetched from the GPU or straight from pinned host memory.

    y_t = round(W[id_t] * scale)            scale rounded to W's dtype first, as stock does
    dW_i = scale * sum of dy_t with id_t = i

On a GPU the kernel reads a pinned table through unified addressing: only the rows asked for cross the bus, and nothing
waits for the ids. A table in pageable memory makes the host wait for them. Ids outside the table give rows of NaN on a
GPU (finding them would mean waiting) and an IndexError on a CPU.

Shapes: T ids, V rows of the table, N features.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from pyralis.ops._embedding_kernels import gather_kernel, join_kernel, sum_kernel
from pyralis.ops._token_order import TokenOrder
from pyralis.ops._triton import (
    FLOAT_DTYPES,
    at_least_float32,
    cdiv,
    launch,
    next_power_of_2,
    unavailable,
    unsupported_tensors,
    warps_for,
)

PIECE = 64  # places of a run that one program sums: as many steps again join the 4096 tokens of one row


@dataclass(frozen=True, slots=True)
class EmbeddingLaunch:
    """A program's columns of one row."""

    block_n: int
    num_warps: int

    @classmethod
    def gather(cls, features: int) -> EmbeddingLaunch:
        block_n = min(next_power_of_2(features), 4096)
        return cls(block_n, warps_for(block_n))

    @classmethod
    def scatter(cls, features: int) -> EmbeddingLaunch:
        block_n = min(next_power_of_2(features), 2048)
        return cls(block_n, warps_for(block_n))


def supported(ids: Tensor, table: Tensor, *others: Tensor | None) -> str | None:
    """Why the kernels cannot take these tensors; None if they can. others: output or gradients, on ids' device."""
    if (reason := unavailable(ids.device)) is not None:
        return reason
    if ids.dtype not in (torch.int32, torch.int64):
        return f"ids are {ids.dtype}"
    if table.dtype not in FLOAT_DTYPES:
        return f"dtype {table.dtype}"
    if table.stride(1) != 1:
        return "the table's rows are not contiguous"
    if table.device != ids.device and not (ids.device.type == "cuda" and table.device.type == "cpu"):
        return f"tensors on {ids.device} and {table.device}"
    if table.device != ids.device and not table.is_pinned():
        return "the table lies in pageable host memory: Tensor.pin_memory() lets the GPU read it"
    present = [t for t in others if t is not None]
    if any(t.device != ids.device for t in present):
        return f"an output is not on {ids.device}"
    return unsupported_tensors(*present) if present else None


@lru_cache
def _rounded(scale: float, dtype: torch.dtype) -> float:
    return float(torch.tensor(scale, dtype=dtype, device="cpu"))


def reference(ids: Tensor, table: Tensor, scale: float | None = None) -> Tensor:
    """y [T, N] in the table's dtype on ids' device, as stock transformers rounds; float64 in, float64 out."""
    y = table.index_select(0, ids.to(table.device)).to(ids.device)
    return y if scale is None else y * torch.tensor(scale, dtype=table.dtype, device=y.device)


def reference_backward(
    dy: Tensor, ids: Tensor, dtable: Tensor, scale: float | None = None, *, padding_id: int | None = None
) -> None:
    """Adds the gradient to dtable [V, N], summed in float32 (float64 for float64)."""
    ids = ids.to(dtable.device)
    dy = dy.to(dtable.device, at_least_float32(dy.dtype))
    if padding_id is not None:
        dy, ids = dy[ids != padding_id], ids[ids != padding_id]
    used, place = torch.unique(ids, return_inverse=True)
    sums = torch.zeros((used.numel(), dy.shape[1]), dtype=dy.dtype, device=dy.device).index_add_(0, place, dy)
    if scale is not None:
        sums *= _rounded(scale, dtable.dtype)
    dtable[used] = (dtable[used] + sums).to(dtable.dtype)


def embedding_forward(ids: Tensor, table: Tensor, scale: float | None = None, *, out: Tensor | None = None) -> Tensor:
    """y [T, N]. No autograd.

    ids: [T] int64 or int32. table: [V, N], any row stride, on ids' device or in host memory. scale: None for none.
    out: [T, N] of any row stride and float dtype (a float32 residual stream); by default in the table's dtype.
    """
    T, N = ids.numel(), table.shape[1]
    y = torch.empty((T, N), dtype=table.dtype, device=ids.device) if out is None else out
    if supported(ids, table, y) is not None:
        return y.copy_(reference(ids, table, scale))
    plan = EmbeddingLaunch.gather(N)
    launch(
        gather_kernel, (T, cdiv(N, plan.block_n)),
        ids, table, y, table.shape[0], table.stride(0), y.stride(0),
        1.0 if scale is None else _rounded(scale, table.dtype),
        device=ids.device, num_warps=plan.num_warps, N=N, BLOCK_N=plan.block_n, SCALED=scale is not None,
    )  # fmt: skip
    return y


def embedding_backward(
    dy: Tensor, ids: Tensor, dtable: Tensor, scale: float | None = None, *, padding_id: int | None = None,
    accumulate: bool = False,
) -> None:  # fmt: skip
    """dtable [V, N] = the gradient of the table, or += with `accumulate`; the row of padding_id gets none.

    Each row is summed in float32 in the order of its tokens (in pieces of 64 of them): deterministic. Where no token
    is, rows are zeroed: of a large vocabulary that is nearly all the memory traffic, V N elements written beside T N
    read. Allocates a sort of the ids and, for more than 64 tokens, float32 sums of cut runs, [T / 32, N].
    dy: [T, N], any row stride.
    """
    T, N = dy.shape
    if not accumulate:
        dtable.zero_()
    if T == 0:
        return
    if supported(ids, dtable, dy, dtable) is not None:
        reference_backward(dy, ids, dtable, scale, padding_id=padding_id)
        return
    order = TokenOrder.of(ids, len(dtable))
    plan = EmbeddingLaunch.scatter(N)
    pieces, blocks = cdiv(T, PIECE), cdiv(N, plan.block_n)
    partial = torch.empty((pieces, 2, N) if pieces > 1 else 1, dtype=torch.float32, device=dy.device)
    padding = -1 if padding_id is None else padding_id
    factor = 1.0 if scale is None else _rounded(scale, dtable.dtype)
    options: dict[str, Any] = {
        "device": dy.device, "num_warps": plan.num_warps, "N": N, "BLOCK_N": plan.block_n, "PIECE": PIECE,
        "AT_ONCE": 4, "ACCUMULATE": accumulate,
    }  # fmt: skip
    launch(
        sum_kernel, (T, blocks), dy, order.rows, order.tokens, order.ends, dtable, partial,
        len(dtable), dy.stride(0), dtable.stride(0), padding, factor, **options,
    )  # fmt: skip
    launch(
        join_kernel, (pieces - 1, blocks), order.rows, order.ends, partial, dtable,
        len(dtable), dtable.stride(0), padding, factor, **options,
    )  # fmt: skip


class _Embedding(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, ids: Tensor, table: Tensor, scale: float | None, padding_id: int | None) -> Tensor:
        ctx.save_for_backward(ids)
        ctx.table, ctx.scale, ctx.padding_id = (table.shape, table.dtype, table.device), scale, padding_id
        return embedding_forward(ids.reshape(-1), table, scale).view(*ids.shape, table.shape[1])

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        (ids,) = ctx.saved_tensors
        shape, dtype, device = ctx.table
        dtable = torch.empty(shape, dtype=dtype, device=device)
        rows = dy.reshape(-1, shape[1])
        embedding_backward(rows, ids.reshape(-1), dtable, ctx.scale, padding_id=ctx.padding_id)
        return None, dtable, None, None


def embedding(ids: Tensor, table: Tensor, scale: float | None = None, *, padding_id: int | None = None) -> Tensor:
    """Rows [..., N] of table [V, N] for ids [...]; differentiable in the table unless it is frozen.

    The gradient of a trained table lies where the table does: for one in host memory it is summed on the CPU.
    """
    return _Embedding.apply(ids, table, scale, padding_id)
