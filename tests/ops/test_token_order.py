from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from pyralis.ops import _token_order
from pyralis.ops._token_order import RANKED_TOKENS, TokenOrder
from pyralis.ops._triton import kernels_on_cpu
from tests.ops.harness import interpreted


def check(ids: Tensor, table_rows: int) -> None:
    order = TokenOrder.of(ids, table_rows)
    inside = (ids >= 0) & (ids < table_rows)
    expected = torch.sort(torch.where(inside, ids, table_rows), stable=True)
    kept = int(inside.sum())
    place = order.rows.long()
    found = (place >= 0) & (place < table_rows)  # the sort leaves negative ids in front, the ranks put them last
    assert int(found.sum()) == kept
    assert torch.equal(order.tokens.long().sort().values, torch.arange(len(ids), device=ids.device))
    assert torch.equal(place[found], expected.values[:kept].long())
    assert torch.equal(order.tokens[found].long(), expected.indices[:kept])
    assert torch.equal(order.ends.long()[found], torch.searchsorted(place, place, right=True)[found])


@pytest.mark.parametrize("ids_dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("T", [1, 16, 17, 257, 300])
def test_is_a_stable_sort(device: torch.device, T: int, ids_dtype: torch.dtype) -> None:
    ids = torch.randint(-2, 40, (T,), generator=torch.Generator().manual_seed(T), dtype=ids_dtype).to(device)
    check(ids, 37)


def test_ids_beyond_32_bits_are_no_rows(device: torch.device) -> None:
    check(torch.tensor([3, 2**32 + 3, -(2**32) + 3, 3, 2**31], device=device), 9)


def test_both_ways_agree(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    ids = torch.randint(0, 9, (77,), generator=torch.Generator().manual_seed(1)).to(device)
    ranked = TokenOrder.of(ids, 9)
    monkeypatch.setattr(_token_order, "RANKED_TOKENS", 76)
    by_torch = TokenOrder.of(ids, 9)
    for name in ("rows", "tokens", "ends"):
        assert getattr(ranked, name).dtype == torch.int32
        assert torch.equal(getattr(ranked, name).long(), getattr(by_torch, name))


@interpreted
@settings(max_examples=25, deadline=None, derandomize=True)
@given(ids=st.lists(st.integers(-3, 12), min_size=1, max_size=70), table_rows=st.integers(1, 12))
def test_any_ids(ids: list[int], table_rows: int) -> None:
    with kernels_on_cpu():
        check(torch.tensor(ids), table_rows)


@pytest.mark.gpu
@pytest.mark.parametrize("T", [4096, RANKED_TOKENS, RANKED_TOKENS + 1])
def test_at_the_size_of_a_batch(T: int) -> None:
    check(torch.randint(-1, 128256, (T,), device="cuda"), 128000)
