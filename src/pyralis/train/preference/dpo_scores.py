"""From a batch of `PairCollator` to what the losses and the log read.

Legend: P pairs, S = 2 P sequences, chosen first, N answer tokens, R the most of them in a sequence.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from pyralis.data.pairs import PAIR_KEYS
from pyralis.models.logprobs import TokenLogprobs, causal_lm_logprobs
from pyralis.train.preference.dpo_loss import PairScores

Batch = Mapping[str, Any]


def batch_logprobs(model: nn.Module, batch: Batch, *, with_statistics: bool = False) -> TokenLogprobs:
    """log p of the N answer tokens: one forward of the backbone, the head on the rows that predict them."""
    inputs = {name: value for name, value in batch.items() if name not in PAIR_KEYS}
    if "attention_mask" in inputs:
        inputs["padding_side"] = "right"
    return causal_lm_logprobs(model, inputs, batch["predictors"], batch["targets"], with_statistics=with_statistics)


def by_sequence(batch: Batch, values: Tensor) -> Tensor:
    """[S, R] of values [N], 0 where a sequence has ended. No atomics meet: each token stands in one place."""
    index = batch["response_index"]
    return torch.cat([values, values.new_zeros(1)]).index_select(0, index.flatten()).view(index.shape)


def sequence_logps(batch: Batch, logprobs: Tensor, ld_alpha: float | None = None) -> Tensor:
    """[S] float32: the summed log-probabilities of each answer.

    ld_alpha: weight of the tokens beyond the length of the pair's shorter answer. Liu et al., LD-DPO (2024).
    """
    values = by_sequence(batch, logprobs)
    if ld_alpha is None:
        return values.sum(1)
    lengths = (batch["response_index"] < len(logprobs)).sum(1)
    shared = torch.minimum(*lengths.chunk(2)).repeat(2)
    tail = torch.arange(values.shape[1], device=values.device) >= shared[:, None]
    return torch.where(tail, ld_alpha * values, values).sum(1)


def pair_scores(batch: Batch, logprobs: Tensor, reference: Tensor, ld_alpha: float | None = None) -> PairScores:
    """logprobs: [N]; reference: [S], the summed log-probabilities under the reference."""
    chosen, rejected = sequence_logps(batch, logprobs, ld_alpha).chunk(2)
    ref_chosen, ref_rejected = reference.chunk(2)
    chosen_lengths, rejected_lengths = batch["response_lengths"].to(logprobs.dtype).chunk(2)
    of_chosen = batch["response_index"].chunk(2)[0] < len(logprobs)
    nll = -by_sequence(batch, logprobs).chunk(2)[0].sum() / of_chosen.sum().clamp(min=1)
    return PairScores(chosen, rejected, ref_chosen, ref_rejected, chosen_lengths, rejected_lengths, nll)
