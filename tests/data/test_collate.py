"""Padding, masks, and the pad token that is not there."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from pyralis.data.collate import Collator, num_supervised
from pyralis.data.pack import IGNORED

EXAMPLES: list[dict[str, Any]] = [
    {"input_ids": [5, 6, 7], "labels": [IGNORED, 6, 7], "length": 3},
    {"input_ids": [8], "labels": [8], "length": 1},
]


def test_right_padding() -> None:
    batch = Collator(pad_token_id=9)(EXAMPLES)
    assert {key: value.tolist() for key, value in batch.items()} == {
        "input_ids": [[5, 6, 7], [8, 9, 9]],
        "labels": [[IGNORED, 6, 7], [8, IGNORED, IGNORED]],
        "attention_mask": [[1, 1, 1], [1, 0, 0]],
    }
    assert all(value.dtype == torch.int64 for value in batch.values())
    # a row's first label is predicted by nothing
    assert num_supervised(batch) == 2


@pytest.mark.parametrize(("multiple", "width"), [(None, 3), (1, 3), (3, 3), (8, 8)])
def test_pad_to_multiple(multiple: int | None, width: int) -> None:
    assert Collator(0, multiple)(EXAMPLES)["input_ids"].shape == (2, width)


def test_arrays_and_tensors_are_taken_as_well() -> None:
    wanted = Collator(9)(EXAMPLES)
    for convert in (lambda ids: np.array(ids, dtype=np.int32), torch.tensor):
        converted = [{key: convert(example[key]) for key in ("input_ids", "labels")} for example in EXAMPLES]
        batch = Collator(9)(converted)
        assert all(torch.equal(batch[key], wanted[key]) for key in wanted)


def test_packed_examples_get_positions_and_no_mask() -> None:
    packed = {"input_ids": [5, 6, 7, 8], "labels": [IGNORED, 6, IGNORED, 8], "position_ids": [0, 1, 0, 1]}
    short = {"input_ids": [9], "labels": [IGNORED], "position_ids": [0], "seq_lengths": [1]}
    batch = Collator(0)([packed, short])
    assert sorted(batch) == ["input_ids", "labels", "position_ids"]
    assert batch["position_ids"].tolist() == [[0, 1, 0, 1], [0, 0, 1, 2]]
    assert num_supervised(batch) == 2


@pytest.mark.parametrize(("pad", "eos", "used"), [(4, 2, 4), (0, 2, 0), (None, 2, 2), (None, None, 0)])
def test_the_pad_token(pad: int | None, eos: int | None, used: int) -> None:
    tokenizer: Any = SimpleNamespace(pad_token_id=pad, eos_token_id=eos)
    collate = Collator.for_tokenizer(tokenizer, 4)
    assert collate == Collator(used, 4)
    # a real EOS is learnt even where it is also the padding
    batch = collate([{"input_ids": [5, 2], "labels": [IGNORED, 2]}])
    assert batch["labels"].tolist() == [[IGNORED, 2, IGNORED, IGNORED]]
