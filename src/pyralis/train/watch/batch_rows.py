"""Which rows a batch is made of: how their text begins, and where they stand in the prepared data."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from datasets import Dataset
from torch import Tensor

from pyralis.ops._loss import IGNORE_INDEX

BEGINNING_TOKENS, BEGINNING_CHARACTERS = 48, 100
MOST_CANDIDATES = 4096  # rows of one length that are compared, which takes a second or so


@dataclass(frozen=True, slots=True)
class BatchRow:
    """A sequence of a batch. row: its index in the prepared training data, from 0; None where it was not found."""

    text: str
    row: int | None = None

    def __str__(self) -> str:
        return f"{self.text!r}" if self.row is None else f"row {self.row}, {self.text!r}"


def batch_rows(batch: Mapping[str, Any], tokenizer: Any, dataset: Any = None) -> list[BatchRow]:
    """The sequences of a batch as the trainer holds it: rows of `input_ids` [B, S], or the parts of packed ones."""
    ids = batch.get("input_ids")
    if not isinstance(ids, Tensor) or ids.dim() != 2:
        return []
    found = []
    labels = batch.get("labels")
    learnt = labels.tolist() if isinstance(labels, Tensor) and labels.shape == ids.shape else ids.tolist()
    for line, targets, parts in zip(ids.tolist(), learnt, _parts(batch, ids)):
        if len(parts) > 1 and set(targets[parts[-1]]) == {IGNORE_INDEX} and len(set(line[parts[-1]])) == 1:
            del parts[-1]  # the padding of a packed row
        length = parts[-1].stop
        row = find_row(dataset, line[:length]) if len(parts) == 1 else None
        found += [BatchRow(_beginning(line[part], tokenizer), row) for part in parts]
    return found


def _parts(batch: Mapping[str, Any], ids: Tensor) -> list[list[slice]]:
    """Of each line, where its sequences lie; right padding left out where a mask tells it."""
    mask, positions = batch.get("attention_mask"), batch.get("position_ids")
    if isinstance(positions, Tensor) and positions.shape == ids.shape:
        lines = []
        for line in positions.tolist():
            starts = [i for i, position in enumerate(line) if position == 0] or [0]
            lines.append([slice(start, end) for start, end in zip(starts, [*starts[1:], len(line)])])
        return lines
    if isinstance(mask, Tensor) and mask.shape == ids.shape:
        return [[slice(0, max(int(length), 1))] for length in mask.sum(1).tolist()]
    return [[slice(0, ids.shape[1])] for _ in range(len(ids))]


def _beginning(ids: Sequence[int], tokenizer: Any) -> str:
    if not hasattr(tokenizer, "decode"):
        return " ".join(map(str, ids[:BEGINNING_TOKENS]))
    text = " ".join(str(tokenizer.decode(ids[:BEGINNING_TOKENS])).split())
    return text if len(text) <= BEGINNING_CHARACTERS else text[: BEGINNING_CHARACTERS - 3] + "..."


def find_row(dataset: Any, ids: Sequence[int]) -> int | None:
    """The first row of a prepared dataset with these tokens; None if it is not among the first of its length."""
    if not isinstance(dataset, Dataset) or not {"length", "input_ids"} <= set(dataset.column_names):
        return None
    lengths = np.asarray(dataset.select_columns(["length"]).with_format("numpy")[:]["length"])
    tokens = dataset.select_columns(["input_ids"]).with_format("numpy")
    for index in np.flatnonzero(lengths == len(ids))[:MOST_CANDIDATES].tolist():
        if np.array_equal(tokens[index]["input_ids"], ids):
            return int(index)
    return None


def to_cpu(batch: Mapping[str, Any]) -> dict[str, Tensor]:
    """The tensors of a batch, on the CPU and contiguous."""
    tensors = {name: value for name, value in batch.items() if isinstance(value, Tensor)}
    return {name: value.detach().to("cpu", copy=True).contiguous() for name, value in tensors.items()}
