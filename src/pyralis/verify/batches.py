"""The batches that stock and fast are compared on: the same examples padded on the right, on the left, and packed."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import cycle
from typing import Any, Literal, NamedTuple, TypeAlias

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from pyralis.data.dataset import build_dataset, template_for
from pyralis.data.formats import detect_format, parse_row
from pyralis.data.read import read_rows
from pyralis.data.settings import DataSettings, TaskType
from pyralis.data.stream import DocumentStream
from pyralis.data.tokenize import IGNORE, encode_text
from pyralis.data.types import PlainText
from pyralis.errors import DataError
from pyralis.verify.text import TEXTS

Layout: TypeAlias = Literal["right", "left", "packed"]
LAYOUTS: tuple[Layout, ...] = ("right", "left", "packed")
EXAMPLES_A_ROW = 8  # read from the user's data: enough of them for a packed row


class Example(NamedTuple):
    """Token ids, and labels that are the id where it is learnt, else -100."""

    input_ids: list[int]
    labels: list[int]


@dataclass(frozen=True, slots=True, eq=False)
class Batch:
    """inputs: what the model's forward takes, [B, S] each. labels: [B, S], not shifted; -100: not learnt."""

    layout: Layout
    inputs: dict[str, Tensor]
    labels: Tensor

    @property
    def supervised(self) -> int:
        """How many tokens are learnt."""
        return int((self.labels[:, 1:] != IGNORE).sum())


def make_batches(examples: Sequence[Example], rows: int, tokens: int, device: torch.device) -> list[Batch]:
    """One batch of `rows` rows of up to `tokens` tokens for each layout.

    Rows differ in length, so that there is padding; a packed row is full and has at least two examples in it.

    Raises:
        DataError: no token within these rows is learnt.
    """
    source = cycle(examples)
    padded = [_cut(next(source), tokens - row * tokens // (2 * rows)) for row in range(rows)]
    packed = [_packed_row(source, tokens) for _ in range(rows)]
    batches = [_padded(padded, "right"), _padded(padded, "left"), _packed(packed)]
    for batch in batches:
        if not batch.supervised:
            raise DataError(
                f"none of the {rows * tokens} tokens of the {batch.layout} batch is learnt: give more --tokens, or "
                "data whose answers come sooner."
            )
    return [
        Batch(batch.layout, {name: value.to(device) for name, value in batch.inputs.items()}, batch.labels.to(device))
        for batch in batches
    ]


def built_in_examples(tokenizer: PreTrainedTokenizerBase) -> list[Example]:
    """A text in several languages; every token but the first is learnt."""
    found = []
    for text in TEXTS:
        ids = encode_text(text, tokenizer, add_bos=True, add_eos=False)
        found.append(Example(ids, [IGNORE, *ids[1:]]))
    return found


def examples_of(file: str, tokenizer: PreTrainedTokenizerBase, rows: int, tokens: int) -> list[Example]:
    """The first examples of the user's data, rendered and masked as training does it.

    Raises:
        DataError, TemplateError: as `build_dataset`.
    """
    row, source = next(read_rows(file), (None, None))
    if row is None or source is None:
        raise DataError(f"{file} has no rows.")
    record = parse_row(row, detect_format(row, source), source)
    task: TaskType = "pretrain" if isinstance(record, PlainText) else "sft"
    with tempfile.TemporaryDirectory() as cache:
        settings = DataSettings(
            (file,), tokens, task_type=task, packing=False, max_samples=EXAMPLES_A_ROW * rows, cache_dir=cache
        )
        built = build_dataset(settings, tokenizer, template_for(task, "", tokenizer))
        assert not isinstance(built.train, DocumentStream), "streams are asked for"
        return [Example(list(row["input_ids"]), list(row["labels"])) for row in built.train.to_list()]


def _cut(example: Example, length: int) -> Example:
    return Example(example.input_ids[:length], example.labels[:length])


def _packed_row(source: Iterator[Example], tokens: int) -> list[Example]:
    """Examples that fill a row exactly; the first takes at most two thirds of it."""
    row: list[Example] = []
    room = tokens
    while room:
        ids, labels = _cut(next(source), room if row else max(2 * tokens // 3, 1))
        row.append(Example(ids, [IGNORE, *labels[1:]]))
        room -= len(ids)
    return row


def _padded(rows: Sequence[Example], side: Literal["right", "left"]) -> Batch:
    lengths = [len(row.input_ids) for row in rows]
    width = max(lengths) + (len(set(lengths)) == 1)  # there is padding in any case
    ids = torch.zeros((len(rows), width), dtype=torch.int64)
    mask, labels = torch.zeros_like(ids), torch.full_like(ids, IGNORE)
    for index, (row, length) in enumerate(zip(rows, lengths)):
        place = slice(0, length) if side == "right" else slice(width - length, width)
        ids[index, place], mask[index, place] = torch.tensor(row.input_ids), 1
        labels[index, place] = torch.tensor(row.labels)
        labels[index, place.start] = IGNORE  # what a pad token predicts is not defined
    return Batch(side, {"input_ids": ids, "attention_mask": mask}, labels)


def _packed(rows: Sequence[Sequence[Example]]) -> Batch:
    inputs: dict[str, Any] = {
        "input_ids": torch.tensor([[token for part in row for token in part.input_ids] for row in rows]),
        "position_ids": torch.tensor([[place for part in row for place in range(len(part.input_ids))] for row in rows]),
    }
    return Batch("packed", inputs, torch.tensor([[label for part in row for label in part.labels] for row in rows]))
