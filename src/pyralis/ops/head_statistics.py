"""What preference trainers log of each token's distribution: entropy, mean logit, and whether the label is likeliest.

    entropy = log(S) - sum_j e_j * (z_j - M) / S       e_j = exp(z_j - M), M = max z, S = sum_j e_j
    mean    = sum_j z_j / V

z is the logit after scale and softcap (`cross_entropy.py`), in float32. No gradient. It costs some passes over the
logits that `token_logprobs` has just made, in parts of at most `PART_BYTES`, and no GEMM.

Shapes: n rows, V vocabulary.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from pyralis.ops._loss import PLAIN, LossSettings, transform

__all__ = ["HeadStatistics", "head_statistics", "reference"]

PART_BYTES = 64 << 20  # of float32 logits at a time; two or three such copies live at once


class HeadStatistics(NamedTuple):
    """[n] each, of float32 but for the last, which is bool."""

    entropy: Tensor
    mean_logit: Tensor
    is_top1: Tensor

    @classmethod
    def empty(cls, rows: int, device: torch.device) -> HeadStatistics:
        entropy, mean = torch.zeros((2, rows), dtype=torch.float32, device=device).unbind()
        return cls(entropy, mean, torch.zeros(rows, dtype=torch.bool, device=device))

    def rows(self, part: slice) -> HeadStatistics:
        return HeadStatistics(*(t[part] for t in self))


def reference(logits: Tensor, labels: Tensor, settings: LossSettings = PLAIN) -> HeadStatistics:
    """The statistics by log-softmax, in float32 (float64 of float64 logits)."""
    z = transform(logits, settings)
    log_p = z.log_softmax(-1)
    return HeadStatistics(-(log_p.exp() * log_p).sum(-1), z.mean(-1), z.argmax(-1) == labels)


@torch.no_grad()
def head_statistics(
    logits: Tensor, labels: Tensor, settings: LossSettings = PLAIN, *, out: HeadStatistics | None = None
) -> HeadStatistics:
    """The statistics of logits [n, V] of any row stride and labels [n]; allocates `out` unless it is given.

    Of a tie for the largest logit the first one counts, as in torch.
    """
    n, V = logits.shape
    out = HeadStatistics.empty(n, logits.device) if out is None else out
    step = max(PART_BYTES // (4 * V), 1)
    for start in range(0, n, step):
        part = slice(start, min(start + step, n))
        z = transform(logits[part], settings)
        maximum, top = z.max(-1)
        out.mean_logit[part] = z.mean(-1)
        out.is_top1[part] = top == labels[part]
        z = z - maximum[:, None]
        e = z.exp()
        total = e.sum(-1)
        out.entropy[part] = total.log() - e.mul_(z).sum(-1) / total
    return out
