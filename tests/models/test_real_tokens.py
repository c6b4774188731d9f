from __future__ import annotations

import pytest
import torch

from pyralis.models.real_tokens import RealTokens, pays
from pyralis.ops.attention_spec import AttentionLayout

CPU = torch.device("cpu")


def padded(seq: int, *lengths: int, left: bool = False) -> AttentionLayout:
    if left:
        return AttentionLayout.left_padded(seq - torch.tensor(lengths), seq, lengths)
    return AttentionLayout.padded(len(lengths), seq, lengths)


@pytest.mark.parametrize("left", [False, True])
def test_where_they_stand(left: bool) -> None:
    tokens = RealTokens.of(padded(4, 4, 0, 3, 1, left=left), CPU)
    mask = torch.tensor([[1, 1, 1, 1], [0, 0, 0, 0], [1, 1, 1, 0], [1, 0, 0, 0]], dtype=torch.bool)
    mask = mask.flip(1) if left else mask
    assert torch.equal(tokens.index, mask.flatten().nonzero().flatten())
    assert tokens.layout.cu_seqlens is not None
    assert (tokens.layout.cu_seqlens.tolist(), tokens.layout.max_seqlen) == ([0, 4, 4, 7, 8], 4)
    assert tokens.layout.cu_seqlens.dtype == torch.int32

    values = torch.randn(4, 4, 3, dtype=torch.float64, requires_grad=True)
    real = tokens.gathered(values)
    assert torch.equal(real[0], values[mask])
    again = tokens.spread(real)
    assert torch.equal(again, values * mask[..., None])
    weights = torch.randn(4, 4, 3, dtype=torch.float64)
    (again * weights).sum().backward()
    assert values.grad is not None
    assert torch.equal(values.grad, weights * mask[..., None])

    shared = torch.arange(4)[None]
    assert torch.equal(tokens.gathered(shared)[0], shared.expand(4, -1)[mask])
    places = mask.flatten().nonzero().flatten()[[5, 0, 0, 7]]
    assert tokens.among_real(places).tolist() == [5, 0, 0, 7]
    assert int(tokens.among_real(torch.tensor([5]))) in range(8)  # of padding: some real token's


def test_one_row_that_stands_for_itself() -> None:
    tokens = RealTokens.of(padded(6, 4), CPU)
    assert tokens.gathered(torch.arange(6)[None]).tolist() == [[0, 1, 2, 3]]


@pytest.mark.parametrize(
    ("seq", "lengths", "expected"),
    [
        (512, (512,) * 8, False),
        (512, (512, 490), False),  # 2 % of padding
        (512, (512, 460), True),
        (600, (600, 250, 240, 300, 180, 420, 90, 210), True),
        (8192, (8192, 6144), False),  # an eighth: attention over sequences would cost more than that
        (8192, (8192, 4096), True),
        (32768, (32768, 24576), False),
        (32768, (32768, 2048), True),
        (64, (0, 0), False),
    ],
)
def test_when_it_pays(seq: int, lengths: tuple[int, ...], expected: bool) -> None:
    assert pays(padded(seq, *lengths)) is expected


def test_on_the_left_attention_is_over_sequences_either_way() -> None:
    assert pays(padded(8192, 8192, 6144, left=True))
    assert not pays(padded(8192, 8192, 8192, left=True))


def test_unknown_lengths() -> None:
    assert not pays(AttentionLayout.padded(2, 64))
    assert not pays(AttentionLayout.packed(torch.tensor([0, 3, 8], dtype=torch.int32), 5, 8))
