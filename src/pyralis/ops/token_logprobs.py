"""log p(label) of every token under a language model's head, for DPO, without stored logits.

    y_t  = z_t,label - log(sum_j exp(z_tj))          z: hidden @ weight^T + bias, scaled and capped
    dz_t = dy_t * ([j = label] - softmax(z_t))

The forward keeps a row's maximum and sum; the backward, where each token's upstream gradient arrives, computes the
logits of a chunk once more. Rows labelled -100 get 0 and have no gradient; they are left out before the head when
`supervised_rows` tells how many are not.

In float16 dlogits would flush or overflow with the upstream gradient: there it is scaled by a power of two so that the
largest |dy| lies in [128, 256), which is undone in float32 at the end.

Shapes and the equations' source: `linear_cross_entropy.py`, `cross_entropy.py`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pyralis.ops import cross_entropy
from pyralis.ops._head import HeadChunks, HeadGradients, SupervisedRows, check_head, logit_chunks, scaled_rows
from pyralis.ops._loss import IGNORE_INDEX, PLAIN, LossSettings, RowLosses
from pyralis.ops.cross_entropy import cross_entropy_backward, cross_entropy_forward
from pyralis.ops.head_statistics import HeadStatistics, head_statistics
from pyralis.ops.linear_cross_entropy import FLOAT16_HEADROOM, supported

__all__ = ["reference", "supported", "token_logprobs", "token_logprobs_backward", "token_logprobs_forward"]


def reference(
    hidden: Tensor, weight: Tensor, labels: Tensor, bias: Tensor | None = None, settings: LossSettings = PLAIN
) -> Tensor:
    """y [T] with all logits at once, differentiable by autograd; float32, or float64 of float64 inputs."""
    return -cross_entropy.reference(torch.nn.functional.linear(hidden, weight, bias), labels, settings)


@torch.no_grad()
def token_logprobs_forward(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    bias: Tensor | None = None,
    settings: LossSettings = PLAIN,
    supervised_rows: int | None = None,
    chunk_bytes: int | None = None,
    statistics: HeadStatistics | None = None,
) -> tuple[Tensor, RowLosses]:
    """(y [T], what the backward needs of each of the R rows). No autograd; arguments as of `token_logprobs`."""
    check_head(hidden, weight, bias, labels)
    if statistics is not None and supervised_rows is not None:
        raise ValueError("statistics are of all rows; leave supervised_rows out, and give only the rows that count")
    rows = SupervisedRows.of(labels, supervised_rows)
    if rows is not None:
        hidden, labels = hidden.index_select(0, rows.index), rows.labels
    stats = RowLosses.empty(len(hidden), hidden)
    for part, logits in logit_chunks(HeadChunks.for_head(hidden, weight, chunk_bytes), hidden, weight, bias):
        cross_entropy_forward(logits, labels[part], settings, out=stats.rows(part))
        if statistics is not None:
            head_statistics(logits, labels[part], settings, out=statistics.rows(part))
    y = -stats.loss
    if rows is not None:
        y = torch.cat([y, y.new_zeros(1)]).index_select(0, rows.place) + rows.poison
    return y, stats


@torch.no_grad()
def token_logprobs_backward(
    dy: Tensor,
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    stats: RowLosses,
    *,
    bias: Tensor | None = None,
    settings: LossSettings = PLAIN,
    supervised_rows: int | None = None,
    chunk_bytes: int | None = None,
    needs: tuple[bool, bool, bool] = (True, False, False),
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """(dhidden [T, H], dweight [V, H], dbias [V]), those asked for by `needs`. dy: [T] float32."""
    scale, factor = -dy.masked_fill(labels == IGNORE_INDEX, 0.0), None
    rows = SupervisedRows.of(labels, supervised_rows)
    if rows is not None:
        hidden, labels, scale = hidden.index_select(0, rows.index), rows.labels, scale[rows.index] + rows.poison
    if hidden.dtype == torch.float16 and len(scale):
        largest = scale.abs().amax()
        largest = largest + (largest == 0)
        power = FLOAT16_HEADROOM * torch.frexp(largest)[0] / largest
        scale, factor = scale * power, 1 / power
    chunks = HeadChunks.for_head(hidden, weight, chunk_bytes, trained=needs[1])
    gradients = HeadGradients.empty(chunks, hidden, weight, bias, needs, in_place=rows is not None)
    for part, logits in logit_chunks(chunks, hidden, weight, bias):
        cross_entropy_backward(logits, labels[part], stats.rows(part), scale[part], settings, out=logits)
        gradients.add(part, logits, hidden, weight)
    gradients.finish()
    dhidden, dweight, dbias = gradients.hidden, gradients.weight, gradients.bias
    if dbias is not None:
        dbias = (dbias if factor is None else dbias * factor).to(weight.dtype)
    return (
        None if dhidden is None else scaled_rows(dhidden, factor, hidden.dtype, None if rows is None else rows.place),
        None if dweight is None else scaled_rows(dweight, factor, weight.dtype),
        dbias,
    )


class _TokenLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, settings: LossSettings,
        supervised_rows: int | None, chunk_bytes: int | None, statistics: HeadStatistics | None,
    ) -> Tensor:  # fmt: skip
        x, flat = hidden.reshape(-1, hidden.shape[-1]), labels.reshape(-1)
        y, stats = token_logprobs_forward(
            x, weight, flat, bias=bias, settings=settings, supervised_rows=supervised_rows, chunk_bytes=chunk_bytes,
            statistics=statistics,
        )  # fmt: skip
        ctx.save_for_backward(x, weight, bias, flat, *stats)
        ctx.shape, ctx.settings, ctx.supervised_rows, ctx.chunk_bytes = (
            hidden.shape, settings, supervised_rows, chunk_bytes,
        )  # fmt: skip
        return y.view(labels.shape)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, bias, labels, *stats = ctx.saved_tensors
        dhidden, dweight, dbias = token_logprobs_backward(
            dy.reshape(-1), x, weight, labels, RowLosses(*stats), bias=bias, settings=ctx.settings,
            supervised_rows=ctx.supervised_rows, chunk_bytes=ctx.chunk_bytes, needs=ctx.needs_input_grad[:3],
        )  # fmt: skip
        return None if dhidden is None else dhidden.view(ctx.shape), dweight, dbias, *[None] * 5


def token_logprobs(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    bias: Tensor | None = None,
    supervised_rows: int | None = None,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    chunk_bytes: int | None = None,
    statistics: HeadStatistics | None = None,
) -> Tensor:
    """y [...] float32, 0 where the label is -100; differentiable in hidden [..., H], weight [V, H] and bias [V].

    Arguments and errors as of `linear_cross_entropy`. One backward costs the logits' GEMM a second time. `statistics`
    [T] (`HeadStatistics.empty`) are filled in on the way; they go without `supervised_rows`.
    """
    settings = LossSettings(softcap, logit_scale)
    return _TokenLogprobs.apply(hidden, weight, bias, labels, settings, supervised_rows, chunk_bytes, statistics)
