"""The loss of a causal language model: summed over supervised tokens, divided by their number.

Legend: B batch, S sequence, V vocabulary, N supervised tokens of this micro-batch.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from pyralis.ops._loss import IGNORE_INDEX


def supervised_loss_sum(
    logits: torch.Tensor, labels: torch.Tensor, *, label_smoothing: float = 0.0
) -> tuple[torch.Tensor, torch.Tensor]:
    """Cross entropy of predicting `labels[:, t + 1]` from `logits[:, t]`, summed over the supervised tokens.

    Only supervised rows are cast to float32: with a V of 128k, a row costs 0.5 MB there.

    Args:
        logits: [B, S, V], any float dtype.
        labels: [B, S] int64, -100 where nothing is learnt.
        label_smoothing: epsilon of Szegedy et al. 2016, eq. 8; 0 is plain cross entropy.

    Returns:
        (loss sum, float32 scalar with gradient; N, int64 scalar). With N = 0 the sum is a zero that still has a
        gradient (zeros), so that a data-parallel rank without supervised tokens stays in step with the others.
    """
    targets_BS = labels[:, 1:]
    kept_BS = targets_BS != IGNORE_INDEX
    rows_NV = logits[:, :-1][kept_BS].float()
    targets_N = targets_BS[kept_BS]
    loss = F.cross_entropy(rows_NV, targets_N, reduction="sum", label_smoothing=label_smoothing)
    return loss, kept_BS.sum()
