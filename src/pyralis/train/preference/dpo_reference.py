"""The reference policy of preference training: log-probabilities that the model is held to.

Where they come from, in this order:

- the batch, where they were computed beforehand (`dpo_precompute.py`);
- a model of its own;
- the adapter named "ref", a frozen copy of the trained one as it was (TRL makes it for an adapter that was trained
  before);
- the model with its adapters off.

The reference's forward comes before the policy's, while no activations are kept.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn

from pyralis.errors import ModelError
from pyralis.lora.switch import with_adapter, without_adapters
from pyralis.train.preference.dpo_scores import Batch, batch_logprobs, sequence_logps

REF_ADAPTER = "ref"


@dataclass(frozen=True, slots=True, eq=False)
class Reference:
    """model: the policy, unwrapped (PEFT stays). other: a reference model of its own."""

    model: nn.Module
    other: nn.Module | None = None
    ld_alpha: float | None = None

    @property
    def kind(self) -> str:
        """In words, for logs and reports."""
        if self.other is not None:
            return "a model of its own"
        if not isinstance(self.model, PeftModel):
            return "the model before training"
        return f'the adapter "{REF_ADAPTER}"' if REF_ADAPTER in self.model.peft_config else "the model without adapters"

    def as_reference(self) -> AbstractContextManager[Any]:
        """While it lasts, `self.policy` computes what the reference does."""
        if self.other is not None or not isinstance(self.model, PeftModel):
            return nullcontext()
        if REF_ADAPTER in self.model.peft_config:
            return with_adapter(self.model, REF_ADAPTER)
        return without_adapters(self.model)

    @property
    def policy(self) -> nn.Module:
        return self.model if self.other is None else self.other

    @torch.no_grad()
    def logps(self, batch: Batch) -> Tensor:
        """[S] float32, chosen first.

        Raises:
            ModelError: a fully trained model is not its own reference any more, and the batch brings none.
        """
        if "ref_chosen_logps" in batch:
            return torch.cat([batch["ref_chosen_logps"], batch["ref_rejected_logps"]])
        if self.other is None and not isinstance(self.model, PeftModel):
            raise ModelError(
                "the reference of a fully trained model has to be computed before training, or be a model of its own: "
                "set precompute_ref_log_probs, or pass ref_model."
            )
        return self.compute(batch)

    @torch.no_grad()
    def as_it_is(self, batch: Batch) -> Tensor:
        """[S] float32, of the model as it stands: before training it is its own reference."""
        return sequence_logps(batch, batch_logprobs(self.policy, batch).logprobs, self.ld_alpha)

    @torch.no_grad()
    def compute(self, batch: Batch) -> Tensor:
        """[S] float32, by a forward now."""
        with self.as_reference():
            return self.as_it_is(batch)
