"""The gradient of an embedding table where many tokens read one row."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from pyralis.ops import _token_order
from pyralis.ops.embedding import PIECE, embedding_backward
from tests.ops.harness import Accuracy, guarded, random


def runs(lengths: tuple[int, ...], device: torch.device) -> Tensor:
    """ids [T] in an order of their own, the id i `lengths[i]` times."""
    ids = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    return ids[torch.randperm(len(ids), generator=torch.Generator().manual_seed(len(ids)))].to(device)


@pytest.mark.parametrize("sorted_by_torch", [False, True])
@pytest.mark.parametrize(
    "lengths",
    [(PIECE,), (PIECE + 1,), (3 * PIECE,), (PIECE - 1, 2), (1, PIECE, PIECE - 1, 1), (0, 5, 6 * PIECE + 3, 0, 70, 1)],
)
def test_frequent_ids(
    device: torch.device, lengths: tuple[int, ...], sorted_by_torch: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Runs within, up to and over the edges of pieces; small integers, whose sums are exact in any order."""
    if sorted_by_torch:
        monkeypatch.setattr(_token_order, "RANKED_TOKENS", 0)
    ids = runs(lengths, device)
    dy = random(len(ids), 40, dtype=torch.float32, device=device, seed=3, scale=4.0).round()
    expected = torch.zeros(len(lengths), 40, device=device).index_add_(0, ids, dy)
    dtable = guarded(len(lengths), 40, dtype=torch.float32, device=device, stride=43)
    embedding_backward(dy, ids, dtable.view)
    dtable.check()
    assert torch.equal(dtable.view, expected)
    embedding_backward(dy, ids, dtable.view, 2.0, accumulate=True, padding_id=1)
    expected *= torch.tensor([1.0 if row == 1 else 3.0 for row in range(len(lengths))], device=device)[:, None]
    assert torch.equal(dtable.view, expected)
    dtable.check()


def test_frequent_ids_are_summed_in_float32(device: torch.device) -> None:
    accuracy = Accuracy()
    for seed in range(3):
        ids = runs((3, 5 * PIECE, 90), device)
        dy = random(len(ids), 24, dtype=torch.bfloat16, device=device, seed=seed)
        want = torch.zeros(3, 24, dtype=torch.float64, device=device).index_add_(0, ids, dy.double())
        dtable = torch.empty(3, 24, dtype=torch.bfloat16, device=device)
        embedding_backward(dy, ids, dtable)
        accuracy.add("dtable", dtable, want.to(torch.bfloat16), want)
    accuracy.check()


@pytest.mark.gpu
def test_backward_in_a_cuda_graph() -> None:
    """Other ids, other runs: one graph."""
    device = torch.device("cuda", torch.cuda.current_device())
    ids = torch.randint(0, 23, (5000,), device=device)
    dy = random(5000, 200, dtype=torch.bfloat16, device=device, seed=1)
    dtable = torch.empty(23, 200, dtype=torch.bfloat16, device=device)
    embedding_backward(dy, ids, dtable)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        embedding_backward(dy, ids, dtable)
    for new in (ids.flip(0), torch.full_like(ids, 7), torch.arange(5000, device=device) % 23):
        ids.copy_(new)
        graph.replay()
        expected = torch.empty_like(dtable)
        embedding_backward(dy, ids, expected)
        assert torch.equal(dtable, expected)
