"""How a batch lies, told by masks, positions and hints, as stock transformers reads them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from pyralis.models.detect import Reason
from pyralis.models.layout import BatchShape, batch_layout
from pyralis.ops.attention_spec import AttentionLayout

SHAPE = BatchShape(2, 6, torch.device("cpu"))


def layout(shape: BatchShape = SHAPE, **arguments: Any) -> AttentionLayout:
    found = batch_layout(shape, arguments)
    assert isinstance(found, AttentionLayout), found
    return found


def ends(found: AttentionLayout) -> list[int] | None:
    return None if found.cu_seqlens is None else found.cu_seqlens.tolist()


def mask(*rows: str) -> Tensor:
    return torch.tensor([[int(c) for c in row] for row in rows])


def test_nothing_said() -> None:
    found = layout()
    assert (found.batch, found.seq, found.max_seqlen, ends(found)) == (2, 6, 6, None)


@pytest.mark.parametrize("rows", [("111111", "111111"), ("111111", "111000"), ("000000", "100000")])
def test_right_padding_needs_no_mask(rows: tuple[str, str]) -> None:
    assert ends(layout(attention_mask=mask(*rows))) is None
    assert ends(layout(attention_mask=mask(*rows).bool())) is None


def test_left_padding() -> None:
    found = layout(attention_mask=mask("001111", "111111"))
    assert ends(found) == [0, 2, 6, 6, 12]
    assert found.max_seqlen == 6


def test_what_is_said_is_believed_without_a_look() -> None:
    unseen = torch.empty(2, 6, device="meta")  # reading it raises
    assert ends(layout(attention_mask=unseen, padding_side="right")) is None
    assert ends(layout(attention_mask=mask("001111", "111111"), padding_side="left")) == [0, 2, 6, 6, 12]
    with pytest.raises(ValueError, match="padding_side is 'middle'; expected 'right' or 'left'"):
        batch_layout(SHAPE, {"attention_mask": unseen, "padding_side": "middle"})


def test_lengths() -> None:
    assert layout(attention_mask=mask("111100", "111111")).lengths == (4, 6)
    assert layout(attention_mask=mask("001111", "111111").bool()).lengths == (4, 6)
    assert layout(attention_mask=mask("001111", "011111"), padding_side="left").lengths == (4, 5)  # a mask on the host
    unseen = torch.empty(2, 6, device="meta")
    assert layout(attention_mask=unseen, padding_side="right").lengths is None
    for said in ((3, 6), [3, 6], torch.tensor([3, 6])):
        assert layout(attention_mask=unseen, padding_side="right", sequence_lengths=said).lengths == (3, 6)
    assert layout().lengths is None
    for wrong in ((3,), (3, 7), (-1, 6)):
        with pytest.raises(ValueError, match="sequence_lengths is"):
            layout(attention_mask=unseen, padding_side="right", sequence_lengths=wrong)


@pytest.mark.parametrize("rows", [("101111", "111111"), ("001110", "111111"), ("011111", "111110")])
def test_other_masks(rows: tuple[str, str]) -> None:
    assert isinstance(batch_layout(SHAPE, {"attention_mask": mask(*rows)}), Reason)


def test_masks_of_other_shapes() -> None:
    for other in (torch.ones(2, 1, 6, 6), torch.ones(2, 7), {"full_attention": None}):
        assert isinstance(batch_layout(SHAPE, {"attention_mask": other}), Reason)


def test_packed_positions() -> None:
    positions = torch.tensor([[0, 1, 2, 0, 1, 2], [0, 1, 2, 3, 4, 0]])
    found = layout(position_ids=positions)
    assert ends(found) == [0, 3, 6, 11, 12]
    assert (found.max_seqlen, found.tokens) == (5, 12)
    # transformers looks for positions that do not go up by one, not for zeros
    assert ends(layout(position_ids=torch.tensor([[3, 4, 9, 10, 11, 12]] * 2))) == [0, 2, 6, 8, 12]


def test_positions_that_pack_nothing() -> None:
    assert ends(layout(position_ids=torch.arange(6)[None])) is None
    assert ends(layout(position_ids=torch.arange(7, 13).expand(2, -1))) is None
    packed = torch.tensor([[0, 1, 2, 0, 1, 2]])
    assert ends(layout(position_ids=packed)) == [0, 3, 6, 9, 12]  # one row for all
    assert ends(layout(attention_mask=mask("111111", "111111"), position_ids=packed)) is None  # stock: padding only


def test_given_bounds() -> None:
    shape = BatchShape(1, 6, torch.device("cpu"))
    unseen = torch.empty(1, 6, dtype=torch.int64, device="meta")
    bounds = torch.tensor([0, 2, 6])
    found = layout(shape, position_ids=unseen, cu_seq_lens_q=bounds, max_length_q=4)
    assert (ends(found), found.max_seqlen) == ([0, 2, 6], 4)
    assert found.cu_seqlens is not None
    assert found.cu_seqlens.dtype == torch.int32
    assert layout(shape, position_ids=unseen, cu_seq_lens_q=bounds).max_seqlen == 6
    assert isinstance(batch_layout(shape, {"cu_seq_lens_q": bounds}), Reason)
    assert isinstance(batch_layout(SHAPE, {"position_ids": torch.zeros(2, 6), "cu_seq_lens_q": bounds}), Reason)


def test_packed_lengths_that_are_said() -> None:
    unseen = torch.empty(2, 6, dtype=torch.int64, device="meta")
    found = layout(position_ids=unseen, sequence_lengths=(2, 4, 5, 1))
    assert (ends(found), found.max_seqlen, found.tokens) == ([0, 2, 6, 11, 12], 5, 12)
    assert ends(layout(position_ids=unseen, sequence_lengths=[6, 6])) is None
    for wrong in ((2, 4, 5), (6, 6, 0), (13, -1)):
        with pytest.raises(ValueError, match="of a packed batch, 12 tokens in all"):
            layout(position_ids=unseen, sequence_lengths=wrong)


def test_positions_of_other_shapes() -> None:
    for shape in ((3, 2, 6), (2, 5), (3, 6)):
        assert isinstance(batch_layout(SHAPE, {"position_ids": torch.zeros(shape)}), Reason)
