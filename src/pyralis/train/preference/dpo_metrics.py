"""What is logged of preference training, summed on the device: nothing waits for a GPU until a line is due.

The names and the figures are TRL's: a mean over the micro-steps since the last line, each a mean over the pairs, or
over the answer tokens, of all processes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from pyralis.models.logprobs import TokenLogprobs
from pyralis.train.preference.dpo_loss import PairScores
from pyralis.train.preference.dpo_scores import Batch

PAIR_MEANS = (
    "rewards/chosen", "rewards/rejected", "rewards/accuracies", "rewards/margins", "logps/chosen", "logps/rejected",
)  # fmt: skip
TOKEN_MEANS = ("entropy", "logits/chosen", "logits/rejected", "mean_token_accuracy")


@dataclass(slots=True)
class PreferenceMetrics:
    """Collects micro-steps; `take` gives the means and begins anew."""

    beta: float
    _pairs: list[Tensor] = field(default_factory=list)  # [7]: sums of PAIR_MEANS, pairs
    _tokens: list[Tensor] = field(default_factory=list)  # [8]: sums of TOKEN_MEANS, then what each is divided by
    _seen: list[Tensor] = field(default_factory=list)  # []: tokens

    @torch.no_grad()
    def add(self, batch: Batch, scores: PairScores, tokens: TokenLogprobs) -> None:
        chosen, rejected = self.beta * scores.chosen_ratios, self.beta * scores.rejected_ratios
        rows = (chosen, rejected, chosen > rejected, chosen - rejected, scores.chosen, scores.rejected)
        self._pairs.append(torch.stack([row.float() for row in (*rows, torch.ones_like(chosen))]).sum(1))
        self._seen.append(batch["num_tokens"])
        if (statistics := tokens.statistics) is None:
            return
        lengths = (batch["response_index"] < len(tokens.logprobs)).sum(1)
        of_chosen = torch.arange(len(tokens.logprobs), device=lengths.device) < lengths.chunk(2)[0].sum()
        every = torch.ones_like(of_chosen)
        of_each = torch.stack([every, of_chosen, ~of_chosen, of_chosen]).float()
        mean_logit = statistics.mean_logit
        values = (statistics.entropy, mean_logit, mean_logit, statistics.is_top1.float())
        self._tokens.append(torch.cat([(torch.stack(values) * of_each).sum(1), of_each.sum(1)]))

    def tokens_seen(self, reduce: Callable[[Tensor], Tensor]) -> int:
        """Tokens of both sequences of each pair since this was last asked; `reduce` sums over processes."""
        if not self._seen:
            return 0
        seen, self._seen = torch.stack(self._seen).sum(), []
        return int(reduce(seen))

    def take(self, reduce: Callable[[Tensor], Tensor], *, pooled: bool = False) -> dict[str, float]:
        """The means since the last time; all processes have to ask. Tokens not asked for are forgotten.

        pooled: over all pairs alike, where TRL takes the mean of the micro-steps' means.
        """
        means: dict[str, float] = {}
        for names, rows in ((PAIR_MEANS, self._pairs), (TOKEN_MEANS, self._tokens)):
            if rows:
                found = reduce(torch.stack(rows)).double()
                sums, counts = (found.sum(0, keepdim=True) if pooled else found).tensor_split([len(names)], 1)
                values = torch.where(counts > 0, sums / counts, 0.0).mean(0)
                means |= dict(zip(names, values.tolist()))
                rows.clear()
        self._seen.clear()
        return means
