"""Cross entropy of a language model's head, whose logits exist only a chunk of rows at a time.

    loss = sum over rows of cross_entropy(hidden @ weight^T + bias, label) / num_items

The gradient is computed in the forward, while a chunk's logits are there: dlogits overwrites them, then one GEMM gives
the rows of dhidden, one more is added into dweight if the head is trained. The backward only multiplies by the upstream
gradient. As in stock transformers the logits are rounded to the compute dtype by the GEMM (which sums in float32) and
so is dlogits; all between is float32.

Rows labelled -100 are left out before the head when the caller tells how many are not (`supervised_rows`, which a
collator counts on the CPU): which rows they are is found on the device, at a shape known beforehand.

In float16 dlogits is about 1 / num_items, which flushes (below 6e-8), while the loss scale that would prevent it comes
only in the backward. There it is multiplied by num_items rounded up to a power of two, and by 256; dhidden, dweight and
dbias carry that factor (`unscale` undoes it, exactly) until the backward multiplies by it and by the upstream gradient
in float32. This holds |dhidden| < 65504 for |weight| < 64; a probability of 1e-7 keeps three digits.

Shapes: T rows (tokens), R rows that reach the head, H features, V vocabulary. The equations of the loss are in
`cross_entropy.py`.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from pyralis.errors import PyralisError
from pyralis.ops import cross_entropy
from pyralis.ops._head import (
    HeadChunks,
    HeadGradients,
    SupervisedRows,
    check_head,
    logit_chunks,
    scale_in_place,
    scaled_rows,
)
from pyralis.ops._loss import PLAIN, LossSettings, item_count, mean_loss
from pyralis.ops._triton import at_least_float32
from pyralis.ops.cross_entropy import cross_entropy_forward, cross_entropy_in_place

FLOAT16_HEADROOM = 256.0


class LinearCrossEntropy(NamedTuple):
    """The forward's result. The gradients are those of the loss divided by `unscale`."""

    loss: Tensor  # [] float32
    unscale: Tensor  # [] float32: 1, in float16 a power of two
    dhidden: Tensor | None  # [R, H] in hidden's dtype
    dweight: Tensor | None  # [V, H] float32, or in the weight's dtype when a single chunk gave it
    dbias: Tensor | None  # [V] float32
    place: Tensor | None  # [T] int64: the row of dhidden that belongs to each row of hidden; None: the same


def supported(hidden: Tensor, weight: Tensor, bias: Tensor | None = None) -> str | None:
    """Why the kernels cannot take these tensors; None if they can."""
    return cross_entropy.supported(hidden, weight, bias)


def reference(
    hidden: Tensor, weight: Tensor, labels: Tensor, bias: Tensor | None = None, settings: LossSettings = PLAIN,
    num_items: Tensor | float | None = None,
) -> Tensor:  # fmt: skip
    """The loss with all logits at once, differentiable by autograd; float32, or float64 of float64 inputs."""
    logits = torch.nn.functional.linear(hidden, weight, bias)
    losses = cross_entropy.reference(logits, labels, settings)
    return mean_loss(losses, item_count(num_items, labels, losses.dtype))


@torch.no_grad()
def linear_cross_entropy_forward(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    bias: Tensor | None = None,
    settings: LossSettings = PLAIN,
    num_items: Tensor | float | None = None,
    supervised_rows: int | None = None,
    chunk_bytes: int | None = None,
    needs: tuple[bool, bool, bool] = (True, False, False),
) -> LinearCrossEntropy:
    """The loss and what the backward needs. No autograd; the arguments are those of `linear_cross_entropy`.

    hidden: [T, H]; labels: [T]. needs: which gradients, of hidden, weight and bias; without any the logits are only
    read. Allocates the gradients, a buffer of logits and, where rows are left out, the rows of hidden that are not
    (dhidden takes their place).
    """
    check_head(hidden, weight, bias, labels)
    rows = SupervisedRows.of(labels, supervised_rows)
    wide = at_least_float32(hidden.dtype)
    items = item_count(num_items, labels, wide)
    if rows is not None:
        items = items + rows.poison
        hidden, labels = hidden.index_select(0, rows.index), rows.labels
    scale, unscale = 1 / items, torch.ones_like(items)
    if hidden.dtype == torch.float16:
        mantissa, _ = torch.frexp(items)  # items = mantissa * 2^e: all that is done with it is exact
        scale, unscale = FLOAT16_HEADROOM / mantissa, mantissa / (items * FLOAT16_HEADROOM)
    chunks = HeadChunks.for_head(hidden, weight, chunk_bytes, trained=needs[1])
    gradients = HeadGradients.empty(chunks, hidden, weight, bias, needs, in_place=rows is not None)
    losses = torch.empty(len(hidden), dtype=wide, device=hidden.device)
    for part, logits in logit_chunks(chunks, hidden, weight, bias):
        if any(needs):
            cross_entropy_in_place(logits, labels[part], scale, settings, loss_out=losses[part])
            gradients.add(part, logits, hidden, weight)
        else:
            losses[part] = cross_entropy_forward(logits, labels[part], settings).loss
    gradients.finish()
    return LinearCrossEntropy(
        mean_loss(losses, items), unscale, gradients.hidden, gradients.weight, gradients.bias,
        None if rows is None else rows.place,
    )  # fmt: skip


@torch.no_grad()
def linear_cross_entropy_backward(
    forward: LinearCrossEntropy, grad: Tensor, dtype: torch.dtype
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """(dhidden [T, H], dweight [V, H], dbias [V]) in `dtype`. grad: [], the loss's gradient.

    A dweight that has this dtype already is scaled where it lies, and costs nothing where grad is 1: call this once.
    """
    factor = grad * forward.unscale
    dweight = forward.dweight
    if dweight is not None and dweight.dtype == dtype:
        scale_in_place(dweight, factor)
    elif dweight is not None:
        dweight = scaled_rows(dweight, factor, dtype)
    return (
        None if forward.dhidden is None else scaled_rows(forward.dhidden, factor, dtype, forward.place),
        dweight,
        None if forward.dbias is None else (forward.dbias * factor).to(dtype),
    )


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, num_items: Tensor | float | None,
        supervised_rows: int | None, settings: LossSettings, chunk_bytes: int | None, training: bool,
    ) -> Tensor:  # fmt: skip
        needs = ctx.needs_input_grad if training else (False, False, False)
        result = linear_cross_entropy_forward(
            hidden.reshape(-1, hidden.shape[-1]), weight, labels.reshape(-1), bias=bias, settings=settings,
            num_items=num_items, supervised_rows=supervised_rows, chunk_bytes=chunk_bytes,
            needs=needs[:3],
        )  # fmt: skip
        ctx.save_for_backward(*result)
        ctx.shape, ctx.dtype, ctx.spent = hidden.shape, hidden.dtype, False
        return result.loss

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.spent:
            raise PyralisError(
                "a second backward through linear_cross_entropy: the first one has handed out the memory of the "
                "trained head's gradient. Compute the loss again"
            )
        ctx.spent = ctx.needs_input_grad[1]
        result = LinearCrossEntropy(*ctx.saved_tensors)
        dhidden, dweight, dbias = linear_cross_entropy_backward(result, grad, ctx.dtype)
        return None if dhidden is None else dhidden.view(ctx.shape), dweight, dbias, *[None] * 6


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    bias: Tensor | None = None,
    num_items: Tensor | float | None = None,
    supervised_rows: int | None = None,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    chunk_bytes: int | None = None,
) -> Tensor:
    """The loss as a float32 scalar, differentiable in hidden, weight and bias (those that require a gradient).

    Under `torch.no_grad()` only the loss is computed: one GEMM and one pass. With a weight that is trained one backward
    only: its gradient is handed out, not copied.

    Args:
        hidden: [..., H], of the weight's dtype.
        weight: [V, H].
        labels: [...] int64, -100 where nothing is learnt; already shifted. One outside the vocabulary gives NaN.
        bias: [V].
        num_items: what the summed loss is divided by: a number, or a scalar tensor on hidden's device; by default the
            number of labels that are not -100. 0 counts as 1: a batch in which nothing is learnt has loss 0.
        supervised_rows: how many labels are not -100, as the CPU knows it. The head then runs on that many rows,
            rounded up (`bucket`). Told too small, loss and gradients are NaN; None runs all rows.
        softcap, logit_scale, label_smoothing, z_loss: see `LossSettings`.
        chunk_bytes: most bytes of logits at a time; by default 512 MiB on a GPU (more with a trained weight: see
            `HeadChunks.for_head`), 64 MiB on a CPU.

    Raises:
        ConfigError: a setting out of its range.
        ValueError: shapes or dtypes that do not fit.
        PyralisError: a second backward with a trained weight.
    """
    settings = LossSettings(softcap, logit_scale, label_smoothing, z_loss)
    training = torch.is_grad_enabled()  # inside `forward` it never is
    return _LinearCrossEntropy.apply(
        hidden, weight, bias, labels, num_items, supervised_rows, settings, chunk_bytes, training
    )
