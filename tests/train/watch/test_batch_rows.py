"""Which rows a batch is made of."""

from __future__ import annotations

import torch
from datasets import Dataset

from pyralis.train.watch.batch_rows import BatchRow, batch_rows, find_row


class Words:
    """A tokenizer of one word a token."""

    def decode(self, ids: list[int]) -> str:
        return " ".join(f"w{i}" for i in ids)


ROWS = [[5, 6, 7], [5, 6, 8], [1, 2], [9] * 60]
DATASET = Dataset.from_dict({"input_ids": ROWS, "length": [len(row) for row in ROWS]}).with_format("numpy")


def test_padded_rows() -> None:
    ids = torch.tensor([[5, 6, 8], [1, 2, 0]])
    mask = torch.tensor([[1, 1, 1], [1, 1, 0]])
    rows = batch_rows({"input_ids": ids, "labels": ids, "attention_mask": mask}, Words(), DATASET)
    assert rows == [BatchRow("w5 w6 w8", 1), BatchRow("w1 w2", 2)]
    assert str(rows[0]) == "row 1, 'w5 w6 w8'"


def test_packed_rows_without_their_padding() -> None:
    ids = torch.tensor([[5, 6, 7, 1, 2, 0, 0]])
    positions = torch.tensor([[0, 1, 2, 0, 1, 0, 1]])
    labels = torch.tensor([[5, 6, 7, 1, 2, -100, -100]])
    rows = batch_rows({"input_ids": ids, "labels": labels, "position_ids": positions}, Words(), DATASET)
    assert rows == [BatchRow("w5 w6 w7"), BatchRow("w1 w2")]
    assert str(rows[1]) == "'w1 w2'"


def test_long_rows_are_cut() -> None:
    ids = torch.tensor([[9] * 60])
    (row,) = batch_rows({"input_ids": ids}, Words(), DATASET)
    assert row.row == 3
    assert len(row.text) == 100
    assert row.text.endswith("...")


def test_what_is_not_known() -> None:
    assert batch_rows({"x": torch.zeros(3)}, Words()) == []
    (row,) = batch_rows({"input_ids": torch.tensor([[5, 6]])}, None)
    assert row == BatchRow("5 6")
    assert find_row(DATASET, [5, 6, 9]) is None
    assert find_row(None, [5, 6]) is None
    assert find_row(Dataset.from_dict({"input_ids": ROWS}), [5, 6, 7]) is None


def test_shuffled_data_is_searched_in_its_order() -> None:
    assert find_row(DATASET.select([2, 0]), [5, 6, 7]) == 1
