"""log p of chosen tokens under a causal language model, differentiable, without stored logits.

`causal_lm_logprobs` asks only for what is wanted: the positions that predict and what they are to predict. Other rows
never reach the head, and a position may predict several tokens (two answers to one prompt). It calls the model as
`causal_lm_loss` does (`causal_lm.py`); where the model is not fast, logits are made by the stock model.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor, nn
from transformers.utils import ModelOutput

from pyralis.models.causal_lm import Head, answer
from pyralis.models.real_tokens import RealTokens
from pyralis.ops.head_statistics import HeadStatistics, head_statistics
from pyralis.ops.token_logprobs import token_logprobs

__all__ = ["TokenLogprobs", "causal_lm_logprobs"]


@dataclass
class TokenLogprobs(ModelOutput):
    logprobs: Tensor  # [N] float32
    statistics: HeadStatistics | None = None  # where they were asked for


@dataclass(frozen=True, eq=False)
class LogprobRequest:
    rows: Tensor
    targets: Tensor
    with_statistics: bool

    def of_hidden(self, hidden: Tensor, head: Head) -> TokenLogprobs:
        chosen = hidden.flatten(0, 1).index_select(0, self.rows.to(hidden.device))
        targets = self.targets.to(chosen.device)
        statistics = HeadStatistics.empty(len(targets), chosen.device) if self.with_statistics else None
        logprobs = token_logprobs(
            chosen, head.weight, targets, bias=head.bias, softcap=head.softcap, logit_scale=head.logit_scale,
            statistics=statistics, chunk_bytes=head.chunk_bytes,
        )  # fmt: skip
        return TokenLogprobs(logprobs, statistics)

    def unpadded(self, tokens: RealTokens) -> LogprobRequest:
        return replace(self, rows=tokens.among_real(self.rows))

    def of_logits(self, logits: Tensor) -> TokenLogprobs:
        chosen = logits.flatten(0, 1).index_select(0, self.rows.to(logits.device))
        targets = self.targets.to(chosen.device)
        logprobs = -nn.functional.cross_entropy(chosen.float(), targets, reduction="none")
        statistics = head_statistics(chosen.detach(), targets) if self.with_statistics else None
        return TokenLogprobs(logprobs, statistics)


def causal_lm_logprobs(
    model: nn.Module,
    inputs: Mapping[str, Any],
    rows: Tensor,
    targets: Tensor,
    *,
    with_statistics: bool = False,
) -> TokenLogprobs:
    """log p(targets[i] | what stands up to position rows[i]), float32.

    Args:
        model: a causal LM as it is called, inside whatever wraps it.
        inputs: the other arguments of its forward, with `input_ids` [B, S]. No cache is made.
        rows: [N] int64 in [0, B * S), the positions of the flattened batch that predict; one may come again.
        targets: [N] int64 token ids.
        with_statistics: entropy, mean logit and top-1 of each position too (`ops/head_statistics.py` has the price).

    Raises:
        ValueError: rows and targets are not of one length.
    """
    if rows.dim() != 1 or rows.shape != targets.shape:
        raise ValueError(f"rows {list(rows.shape)} and targets {list(targets.shape)}; expected one [N] each")
    return answer(model, inputs, LogprobRequest(rows, targets, with_statistics))
