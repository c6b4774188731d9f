"""Cross entropy of given logits, in one pass forward and one backward, or both at once in place.

    z    = softcap * tanh(logit_scale * x / softcap)         x: the logits; without a softcap z = logit_scale * x
    lse  = log(sum_j exp(z_j))
    loss = lse - (1 - e) * z_label - e * mean(z) + z_loss * lse^2                  e: label_smoothing
    dx_j = (p_j * (1 + 2 * z_loss * lse) - (1 - e) * [j = label] - e / V) * dz_j/dx_j,   p = softmax(z)

All of it is float32 whatever the logits are: stock transformers takes the scale and the softcap in the logits' dtype
and only then calls `.float()`. Rows labelled -100 have loss 0 and gradient 0. A label outside the vocabulary makes its
row's loss and gradient NaN (an error there would need the CPU to wait for the GPU).

Shapes: n rows, V vocabulary.
Source of the maths: Milakov and Gimelshein, Online normalizer calculation for softmax (2018), algorithm 3; Szegedy et
al., Rethinking the Inception Architecture (2016), section 7; Chowdhery et al., PaLM (2022), section 5 (z-loss).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pyralis.ops._cross_entropy_kernels import cross_entropy_kernel
from pyralis.ops._loss import IGNORE_INDEX, PLAIN, LossSettings, RowLosses, item_count, mean_loss, transform
from pyralis.ops._triton import launch, next_power_of_2, unsupported_tensors


@dataclass(frozen=True, slots=True)
class CrossEntropyLaunch:
    """One program a row, which goes over it in blocks."""

    block: int  # columns of a tile, a power of two
    vector: int  # adjacent columns held by one thread: 16 bytes
    num_warps: int

    @classmethod
    def of(cls, vocab: int, itemsize: int) -> CrossEntropyLaunch:
        # Two 16-byte loads a thread are in flight; 16 warps leave room for three programs an SM. Of an odd vocabulary
        # the last block is loaded column by column, and more of them at a time, or in wider programs, spill.
        even = vocab % 16 == 0
        per_thread = 32 // itemsize if even else 8
        block = max(min((512 if even else 256) * per_thread, next_power_of_2(vocab)), 32)
        return cls(block, max(16 // itemsize, 1), max(block // (32 * per_thread), 1))


def supported(logits: Tensor, *others: Tensor | None) -> str | None:
    """Why the kernels cannot take these tensors; None if they can."""
    return unsupported_tensors(logits, *others)


def reference(logits: Tensor, labels: Tensor, settings: LossSettings = PLAIN) -> Tensor:
    """Losses [n] of logits [n, V] and labels [n], differentiable; float32, or float64 of float64 logits."""
    z = transform(logits, settings)
    log_p = torch.log_softmax(z, -1)
    loss = -log_p.gather(1, _inside(labels, z.shape[1])[:, None]).squeeze(1)
    if settings.label_smoothing:
        loss = torch.lerp(loss, -log_p.mean(-1), settings.label_smoothing)
    if settings.z_loss:
        loss = loss + settings.z_loss * torch.logsumexp(z, -1).square()
    return _defined(loss, labels, z.shape[1])


def reference_gradient(
    logits: Tensor, labels: Tensor, rows: RowLosses, scale: Tensor, settings: LossSettings = PLAIN
) -> Tensor:
    """dx [n, V] times scale ([] or [n]), in float32."""
    z = transform(logits, settings)
    V = z.shape[1]
    slope: Tensor | float = settings.logit_scale
    if settings.softcap is not None:
        slope = slope * (1 - (z / settings.softcap).square())
    per_row = scale.to(z.dtype).expand(labels.shape)
    lse = rows.maximum + rows.total.log()
    d = torch.exp(z - rows.maximum[:, None]).mul_(((1 + 2 * settings.z_loss * lse) / rows.total)[:, None])
    d.sub_(settings.label_smoothing / V)
    at_label = torch.full_like(per_row, settings.label_smoothing - 1)[:, None]
    d.scatter_add_(1, _inside(labels, V)[:, None], at_label)
    return _defined(d.mul_(slope).mul_(per_row[:, None]), labels, V)


def _inside(labels: Tensor, vocab: int) -> Tensor:
    return labels.clamp(0, vocab - 1)


def _defined(values: Tensor, labels: Tensor, vocab: int) -> Tensor:
    """values [n, ...] with 0 in the rows that are ignored and NaN in those whose label does not exist."""
    labels = labels.view(-1, *[1] * (values.dim() - 1))
    values = values.masked_fill((labels < 0) | (labels >= vocab), float("nan"))
    return values.masked_fill(labels == IGNORE_INDEX, 0.0)


def cross_entropy_forward(
    logits: Tensor, labels: Tensor, settings: LossSettings = PLAIN, *, out: RowLosses | None = None
) -> RowLosses:
    """Losses [n] and the softmax's statistics, in one pass. No autograd; allocates `out` unless it is given.

    logits: [n, V], any row stride. labels: [n] int64.
    """
    rows = RowLosses.empty(len(labels), logits) if out is None else out
    if supported(logits) is None:
        _launch(logits, labels, rows, None, None, settings)
        return rows
    z = transform(logits, settings)
    rows.loss.copy_(reference(logits, labels, settings))
    rows.maximum.copy_(z.amax(-1))
    rows.total.copy_(z.sub_(rows.maximum[:, None]).exp_().sum(-1))
    return rows


def cross_entropy_backward(
    logits: Tensor, labels: Tensor, rows: RowLosses, scale: Tensor, settings: LossSettings = PLAIN, *,
    out: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """dx [n, V] times scale, in one pass, from the statistics of the forward. No autograd.

    scale: float32 on the logits' device, [] or [n]. out: any row stride and float dtype, may be the logits; by default
    [n, V] in their dtype.
    """
    dx = torch.empty_like(logits, memory_format=torch.contiguous_format) if out is None else out
    if supported(logits, dx, scale) is None:
        _launch(logits, labels, rows, scale, dx, settings)
        return dx
    return dx.copy_(reference_gradient(logits, labels, rows, scale, settings))


def cross_entropy_in_place(
    logits: Tensor, labels: Tensor, scale: Tensor, settings: LossSettings = PLAIN, *, loss_out: Tensor
) -> None:
    """Losses [n] into loss_out and, over the logits, their gradient times scale ([] or [n] float32): two passes over
    each row in one launch."""
    if supported(logits, scale, loss_out) is None:
        _launch(logits, labels, (loss_out, None, None), scale, logits, settings)
        return
    rows = cross_entropy_forward(logits, labels, settings)
    loss_out.copy_(rows.loss)
    logits.copy_(reference_gradient(logits, labels, rows, scale, settings))


def _launch(
    logits: Tensor, labels: Tensor, rows: tuple[Tensor, Tensor | None, Tensor | None], scale: Tensor | None,
    dx: Tensor | None, settings: LossSettings,
) -> None:  # fmt: skip
    """The forward without dx; with it the gradient from the statistics in rows, or both where there are none."""
    n, V = logits.shape
    scale_stride = scale.stride(0) if scale is not None and scale.dim() else 0
    plan = CrossEntropyLaunch.of(V, logits.element_size())
    launch(
        cross_entropy_kernel, (n,), logits, labels, *rows, scale, dx,
        logits.stride(0), 0 if dx is None else dx.stride(0), scale_stride,
        settings.logit_scale, settings.softcap, settings.label_smoothing or None, settings.z_loss,
        device=logits.device, num_warps=plan.num_warps, V=V, BLOCK=plan.block, VECTOR=plan.vector,
        FORWARD=dx is None or rows[2] is None,
    )  # fmt: skip


class _CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, labels: Tensor, num_items: Tensor | int | None, settings: LossSettings, in_place: bool
    ) -> Tensor:
        x = logits.reshape(-1, logits.shape[-1])
        labels = labels.reshape(-1)
        rows = cross_entropy_forward(x, labels, settings)
        items = item_count(num_items, labels, rows.loss.dtype)
        ctx.save_for_backward(x, labels, *rows, items)
        ctx.settings, ctx.in_place, ctx.shape = settings, in_place, logits.shape
        return mean_loss(rows.loss, items)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, labels, loss, maximum, total, items = ctx.saved_tensors
        scale = grad.to(loss.dtype) / items
        rows = RowLosses(loss, maximum, total)
        dx = cross_entropy_backward(x, labels, rows, scale, ctx.settings, out=x if ctx.in_place else None)
        return dx.view(ctx.shape), None, None, None, None


def cross_entropy(
    logits: Tensor,
    labels: Tensor,
    *,
    num_items: Tensor | int | None = None,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    in_place: bool = False,
) -> Tensor:
    """The summed loss over `num_items`, a float32 scalar, differentiable in logits [..., V].

    Args:
        labels: [...] int64, -100 where nothing is learnt; already shifted.
        num_items: a number, or a scalar tensor on any device; by default the labels that are not -100.
        in_place: the gradient overwrites the logits, which must then be needed by nobody else; one backward only.

    Raises:
        ConfigError: a setting out of its range.
    """
    settings = LossSettings(softcap, logit_scale, label_smoothing, z_loss)
    return _CrossEntropy.apply(logits, labels, num_items, settings, in_place)
