"""What the CPU knows of a batch when it is collated, and a GPU would have to be waited for later."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from pyralis.models.layout import LENGTHS
from pyralis.ops._loss import IGNORE_INDEX

FACTS = "pyralis_facts"


@dataclass(frozen=True, slots=True)
class BatchFacts:
    """supervised_rows: how many tokens are learnt, as `causal_lm_loss` counts them. tokens: without padding that a mask
    tells. padding_side: of a mask without holes. lengths: of its rows, or of the sequences that packed positions tell;
    None where neither does."""

    supervised_rows: int
    tokens: int
    padding_side: Literal["right", "left"] | None
    lengths: tuple[int, ...] | None = None

    def hints(self, inputs: Mapping[str, Any]) -> dict[str, Any]:
        """How tokens lie, for a model that would have to look. inputs: the batch's, as they are by now."""
        if self.lengths is None or ("attention_mask" in inputs) != (self.padding_side is not None):
            return {}
        return {LENGTHS: self.lengths} | ({"padding_side": self.padding_side} if self.padding_side else {})


@dataclass(frozen=True)
class FactCollator:
    """A collator that leaves `BatchFacts` with each batch, under `FACTS`."""

    collator: Callable[[Sequence[Any]], Any]

    def __call__(self, examples: Sequence[Any]) -> Any:
        batch = self.collator(examples)
        if not isinstance(batch, Mapping) or not _is_text(batch):
            return batch
        return {**batch, FACTS: _facts(batch)}


def take_facts(inputs: dict[str, Any]) -> tuple[dict[str, Any], BatchFacts | None]:
    """(a batch without its facts, the facts)."""
    facts = inputs.get(FACTS)
    return ({k: v for k, v in inputs.items() if k != FACTS} if facts is not None else inputs), facts


def _is_text(batch: Mapping[str, Any]) -> bool:
    ids, labels = batch.get("input_ids"), batch.get("labels")
    return isinstance(ids, Tensor) and isinstance(labels, Tensor) and ids.dim() == 2 and ids.shape == labels.shape


def _facts(batch: Mapping[str, Any]) -> BatchFacts:
    mask, labels = batch.get("attention_mask"), batch["labels"]
    supervised = int((labels[:, 1:] != IGNORE_INDEX).sum())
    if mask is None:
        return BatchFacts(supervised, labels.numel(), None, _packed_lengths(batch))
    if not isinstance(mask, Tensor) or mask.dim() != 2:
        return BatchFacts(supervised, labels.numel(), None)
    kept = mask != 0
    lengths = tuple(kept.sum(1).tolist())
    if (kept[:, 1:] <= kept[:, :-1]).all():
        return BatchFacts(supervised, sum(lengths), "right", lengths)
    if (kept[:, 1:] >= kept[:, :-1]).all():
        return BatchFacts(supervised, sum(lengths), "left", lengths)
    return BatchFacts(supervised, sum(lengths), None)


def _packed_lengths(batch: Mapping[str, Any]) -> tuple[int, ...] | None:
    """Of the sequences of packed rows, unless bounds say where they end."""
    positions = batch.get("position_ids")
    if "cu_seq_lens_q" in batch or not isinstance(positions, Tensor) or positions.shape != batch["input_ids"].shape:
        return None
    starts = torch.ones(positions.shape, dtype=torch.bool)
    starts[:, 1:] = positions.diff(dim=1) != 1
    first = starts.flatten().nonzero().flatten()
    return tuple(torch.cat([first, torch.tensor([positions.numel()])]).diff().tolist())
