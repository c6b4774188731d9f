"""Batches at the length of a bucket: what is real stays as it was, and nothing is learnt from the rest."""

from __future__ import annotations

import pytest
import torch

from pyralis.engine.buckets import Bucketed, bucket_length, bucket_rows, row_length, to_bucket
from pyralis.models.detect import Reason


@pytest.mark.parametrize(
    ("tokens", "length"), [(1, 64), (64, 64), (65, 128), (512, 512), (513, 576), (1025, 1152), (4096, 4096)]
)
def test_bucket_length(tokens: int, length: int) -> None:
    assert bucket_length(tokens) == length


def test_row_length() -> None:
    assert [row_length(tokens) for tokens in (65, 1025, 2049, 2400, 4095, 4097)] == [128, 1088, 2176, 2432, 4096, 4352]
    assert all(0 <= row_length(n) - n < max(64, n / 16) for n in range(1, 9000))


def test_packed_rows_become_one() -> None:
    ids = torch.arange(100).view(2, 50)
    positions = torch.cat([torch.arange(20), torch.arange(30)])[None]  # for both
    found = to_bucket(ids, ids + 1, {"position_ids": positions})
    assert isinstance(found, Bucketed)
    assert found.positions is not None
    assert found.layout.cu_seqlens is not None
    assert found.input_ids[0, :100].tolist() == list(range(100))
    assert found.targets[0, 98:].tolist() == [99, 100] + [-100] * 28
    assert found.positions[0].tolist() == [*positions[0].tolist() * 2, *range(28)]
    assert found.layout.cu_seqlens.tolist() == [0, 20, 50, 70, 100, *[128] * 11]
    assert isinstance(to_bucket(ids, ids, {"position_ids": torch.zeros(3, 2, 50)}), Reason)


@pytest.mark.parametrize("side", ["right", "left"])
def test_padded_rows_become_a_packed_one(side: str) -> None:
    lengths = (50, 9, 0, 20)
    mask = (torch.arange(50) < torch.tensor(lengths)[:, None]).long()
    mask = mask if side == "right" else mask.flip(1)
    ids = torch.arange(200).view(4, 50)
    found = to_bucket(ids, ids + 1, {"attention_mask": mask}, removable=lambda layout: True)
    assert isinstance(found, Bucketed)
    assert found.positions is not None
    assert found.layout.cu_seqlens is not None
    real = ids[mask.bool()]
    assert torch.equal(found.input_ids[0, :79], real)
    assert found.targets[0].tolist() == [*(real + 1).tolist(), *[-100] * 49]
    assert torch.equal(found.positions[0, :79], real % 50)
    assert found.layout.cu_seqlens[:6].tolist() == [0, 50, 59, 59, 79, 128]
    assert (found.layout.cu_seqlens.numel(), found.layout.max_seqlen) == (16, 128)
    for removable in (None, lambda layout: False):
        kept = to_bucket(ids, ids + 1, {"attention_mask": mask}, removable=removable)
        assert isinstance(kept, Bucketed)
        assert kept.input_ids.shape == (4, 64)


@pytest.mark.parametrize(
    ("sequences", "longest", "bounds", "bound"), [(8, 250, 16, 512), (15, 513, 32, 1024), (40, 40, 64, 512)]
)
def test_few_kinds_of_packed_rows(sequences: int, longest: int, bounds: int, bound: int) -> None:
    lengths = [longest] + [min(longest, 100)] * (sequences - 1)
    positions = torch.cat([torch.arange(length) for length in lengths])[None]
    found = to_bucket(positions, positions, {"position_ids": positions, "sequence_lengths": lengths})
    assert isinstance(found, Bucketed)
    assert found.layout.cu_seqlens is not None
    assert (found.layout.cu_seqlens.numel(), found.layout.max_seqlen) == (bounds, bound)


@pytest.mark.parametrize(
    ("rows", "tokens", "kept"),
    [(None, 8, None), (1, 2048, 256), (257, 2048, 512), (1500, 2048, 1536), (2000, 2048, 2048)],
)
def test_bucket_rows(rows: int | None, tokens: int, kept: int | None) -> None:
    assert bucket_rows(rows, tokens) == kept
