"""A micro-step of preference training: the reference's forward, the policy's, the losses of the pairs."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from pyralis.models.logprobs import TokenLogprobs
from pyralis.train.preference.dpo_loss import DPOLoss, PairScores
from pyralis.train.preference.dpo_reference import Reference
from pyralis.train.preference.dpo_scores import Batch, batch_logprobs, pair_scores


@dataclass(frozen=True, slots=True, eq=False)
class PairLosses:
    losses: Tensor  # [P] float32, with gradient
    scores: PairScores
    tokens: TokenLogprobs


@dataclass(frozen=True, slots=True, eq=False)
class PreferenceStep:
    """with_statistics: the entropy, mean logit and top-1 accuracy that TRL logs, some passes over the logits."""

    reference: Reference
    loss: DPOLoss
    with_statistics: bool = False

    def __call__(self, model: nn.Module, batch: Batch) -> PairLosses:
        """model: the policy as it is called, inside whatever wraps it."""
        reference = self.reference.logps(batch)  # first, while the policy keeps no activations
        tokens = batch_logprobs(model, batch, with_statistics=self.with_statistics)
        scores = pair_scores(batch, tokens.logprobs, reference, self.reference.ld_alpha)
        return PairLosses(self.loss(scores), scores, tokens)
