"""What the CPU knows of a batch when it is collated, and a GPU would have to be waited for later."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from pyralis.ops._loss import IGNORE_INDEX

FACTS = "pyralis_facts"


@dataclass(frozen=True, slots=True)
class BatchFacts:
    """supervised_rows: how many tokens are learnt, as `causal_lm_loss` counts them. tokens: without padding that a mask
    tells. padding_side: of a mask without holes. lengths: of its rows, [B]. added: arguments for the decoder that the
    collator did not make."""

    supervised_rows: int
    tokens: int
    padding_side: Literal["right", "left"] | None
    lengths: tuple[int, ...] = ()
    added: tuple[str, ...] = ()


@dataclass(frozen=True)
class FactCollator:
    """A collator that leaves `BatchFacts` with each batch, under `FACTS`.

    Packed batches of one row that come without bounds (`position_ids`, no mask) get `cu_seq_lens_q` and
    `max_length_q`, as later versions of TRL's collator have them.
    """

    collator: Callable[[Sequence[Any]], Any]

    def __call__(self, examples: Sequence[Any]) -> Any:
        batch = self.collator(examples)
        if not isinstance(batch, Mapping) or not _is_text(batch):
            return batch
        added = _bounds(batch)
        return {**batch, **added, FACTS: _facts(batch, tuple(added))}


def take_facts(inputs: dict[str, Any]) -> tuple[dict[str, Any], BatchFacts | None]:
    """(a batch without its facts, the facts)."""
    facts = inputs.get(FACTS)
    return ({k: v for k, v in inputs.items() if k != FACTS} if facts is not None else inputs), facts


def _is_text(batch: Mapping[str, Any]) -> bool:
    ids, labels = batch.get("input_ids"), batch.get("labels")
    return isinstance(ids, Tensor) and isinstance(labels, Tensor) and ids.dim() == 2 and ids.shape == labels.shape


def _facts(batch: Mapping[str, Any], added: tuple[str, ...]) -> BatchFacts:
    mask, labels = batch.get("attention_mask"), batch["labels"]
    supervised, side, tokens = int((labels[:, 1:] != IGNORE_INDEX).sum()), None, labels.numel()
    lengths: tuple[int, ...] = ()
    if isinstance(mask, Tensor) and mask.dim() == 2:
        kept = mask != 0
        lengths = tuple(kept.sum(1).tolist())
        tokens = sum(lengths)
        if (kept[:, 1:] <= kept[:, :-1]).all():
            side = "right"
        elif (kept[:, 1:] >= kept[:, :-1]).all():
            side = "left"
    return BatchFacts(supervised, tokens, side, lengths, added)  # type: ignore[arg-type]


def _bounds(batch: Mapping[str, Any]) -> dict[str, Any]:
    """Where the sequences of a packed row begin, if nobody has said it."""
    positions = batch.get("position_ids")
    if "attention_mask" in batch or "cu_seq_lens_q" in batch or not isinstance(positions, Tensor):
        return {}
    if positions.shape != batch["input_ids"].shape or len(positions) != 1:
        return {}
    starts = torch.ones(positions.shape[1], dtype=torch.bool)
    starts[1:] = positions[0].diff() != 1
    bounds = torch.cat([starts.nonzero().flatten(), torch.tensor([len(starts)])]).to(torch.int32)
    longest = int(bounds.diff().max())
    return {"cu_seq_lens_q": bounds, "cu_seq_lens_k": bounds, "max_length_q": longest, "max_length_k": longest}
