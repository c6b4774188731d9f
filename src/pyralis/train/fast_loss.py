"""The loss of a causal language model inside Hugging Face's Trainer, from the last hidden states, without waiting."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from datasets import IterableDataset
from torch import Tensor, nn

from pyralis.models.causal_lm import causal_lm_loss
from pyralis.train.batch_facts import FACTS, BatchFacts, FactCollator, take_facts
from pyralis.train.lean import LeanTrainer
from pyralis.train.token_counts import TokenCounts


class FastLossTrainer(LeanTrainer):
    """A trainer whose `compute_loss` may call `fast_loss`. It counts tokens, too: `token_counts`.

    What a batch is like (how many tokens are learnt, how it is padded) is found when it is collated and kept beside
    it, out of sight of an overridden `compute_loss`.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.token_counts = TokenCounts()
        self._known: tuple[BatchFacts, Tensor, int] | None = None
        super().__init__(*args, **kwargs)

    def fast_loss(
        self, model: nn.Module, inputs: dict[str, Any], num_items: Tensor | float | None, label_smoothing: float = 0.0
    ) -> Tensor:
        """Sum of the micro-batch's token losses over `num_items` (its own number of tokens if None): float32, scalar.
        No logits are stored where the model is fast."""
        inputs = dict(inputs)
        labels = inputs.pop("labels")
        facts = self._facts_of(labels)
        if facts is None:
            return causal_lm_loss(model, inputs, labels, num_items, label_smoothing=label_smoothing)
        inputs |= facts.hints(inputs)
        return causal_lm_loss(
            model, inputs, labels, num_items, label_smoothing=label_smoothing, supervised_rows=facts.supervised_rows
        )

    def over_processes(self, loss: Tensor, num_items: Tensor | float | None) -> Tensor:
        """A loss over the items of all processes, for data parallelism, which averages gradients: a sum is wanted."""
        if num_items is None or not self.args.average_tokens_across_devices:
            return loss
        return loss * (self.accelerator.num_processes // self.get_tp_size())

    # ---- facts ----

    def get_train_dataloader(self) -> Any:
        with self._facts_collected(self.train_dataset):
            return super().get_train_dataloader()

    def get_eval_dataloader(self, eval_dataset: Any = None) -> Any:
        with self._facts_collected(self.eval_dataset if eval_dataset is None else eval_dataset):
            return super().get_eval_dataloader(eval_dataset)

    @contextmanager
    def _facts_collected(self, dataset: Any) -> Iterator[None]:
        """While a loader is made, so that `data_collator` stays what the user knows it to be."""
        parallel = self.args.world_size > 1 and isinstance(dataset, IterableDataset | torch.utils.data.IterableDataset)
        config: Any = self.args.accelerator_config
        dispatched = parallel and config.dispatch_batches is not False
        if dispatched or self.args.n_gpu > 1:  # what is known of a batch would go to each of its parts
            yield
            return
        own: Any = self.data_collator
        self.data_collator = FactCollator(own)
        try:
            yield
        finally:
            self.data_collator = own

    def _prepare_inputs(self, inputs: dict[str, Any]) -> dict[str, Any]:
        inputs, facts = take_facts(inputs)
        inputs = super()._prepare_inputs(inputs)
        self._known = None if facts is None else (facts, inputs["labels"], inputs["labels"]._version)
        return inputs

    def _facts_of(self, labels: Tensor) -> BatchFacts | None:
        """What is known of a batch, unless somebody has changed its labels since."""
        known, self._known = self._known, None
        if known is None or known[1] is not labels or known[2] != labels._version:
            return None
        return known[0]

    # ---- tokens ----

    def get_batch_samples(self, epoch_iterator: Iterator, num_batches: int, device: torch.device) -> Any:
        batches, num_items = super().get_batch_samples(epoch_iterator, num_batches, device)
        if batches and num_items is not None:
            total = sum(_tokens(batch) for batch in batches)
            if self.args.world_size > 1:
                total = self.accelerator.reduce(torch.as_tensor(total, device=device), reduction="sum")
            self.token_counts.add(num_items, total)
        return batches, num_items


def _tokens(batch: dict[str, Any]) -> Any:
    """Tokens of a batch that are not padding, as far as a mask tells: a number, or a scalar on the batch's device."""
    if (facts := batch.get(FACTS)) is not None:
        return facts.tokens
    mask = batch.get("attention_mask")
    return batch["labels"].numel() if mask is None else mask.sum()
