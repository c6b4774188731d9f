from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers.models.gemma3.modeling_gemma3 import Gemma3TextScaledWordEmbedding

from pyralis.ops._triton import kernels_on_cpu
from pyralis.ops.embedding import (
    EmbeddingLaunch,
    embedding,
    embedding_backward,
    embedding_forward,
    reference,
    supported,
)
from tests.ops.harness import Accuracy, assert_deterministic, guarded, interpreted, oracle_gradients, random

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
CPU = torch.device("cpu")
V, N = 23, 200
SCALE = 2304**0.5  # 48 exactly; 3584**0.5 is rounded by bf16


def make(T: int, dtype: torch.dtype, device: torch.device, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """(ids, few of them often; table; dy)"""
    ids = (random(T, dtype=torch.float32, device=CPU, seed=seed).abs() * 6).long().clamp(max=V - 1).to(device)
    table = random(V, N, dtype=dtype, device=device, seed=seed + 1)
    return ids, table, random(T, N, dtype=dtype, device=device, seed=seed + 2)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scale", [None, SCALE, 3584**0.5])
def test_reference_is_stock(dtype: torch.dtype, scale: float | None) -> None:
    ids, table, _ = make(9, dtype, CPU)
    if scale is None:
        expected = nn.functional.embedding(ids, table)
    else:
        stock = Gemma3TextScaledWordEmbedding(V, N, padding_idx=0, embed_scale=scale).to(dtype)
        stock.weight = nn.Parameter(table, requires_grad=False)
        expected = stock(ids)
    assert torch.equal(reference(ids, table, scale), expected)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scale", [None, 3584**0.5])
@pytest.mark.parametrize("ids_dtype", [torch.int64, torch.int32])
def test_forward_is_the_reference(
    device: torch.device, ids_dtype: torch.dtype, scale: float | None, dtype: torch.dtype
) -> None:
    ids, table, _ = make(7, dtype, device)
    wide = random(V, N + 8, dtype=dtype, device=device, seed=9)[:, :N].copy_(table)  # a table within a wider one
    expected = reference(ids, table, scale)
    for out_dtype in {dtype, torch.float32}:
        out = guarded(7, N, dtype=out_dtype, device=device, stride=N + 24)
        assert embedding_forward(ids.to(ids_dtype), wide, scale, out=out.view) is out.view
        out.check()
        assert torch.equal(out.view, expected.to(out_dtype))
    assert torch.equal(embedding_forward(ids, table, scale), expected)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("T", "padding_id"), [(1, None), (40, None), (61, 2)])
def test_backward(device: torch.device, T: int, padding_id: int | None, dtype: torch.dtype) -> None:
    accuracy, scale = Accuracy(), 3584**0.5
    for seed in range(3):
        ids, table, dy = make(T, dtype, device, seed)
        rounded = torch.tensor(scale, dtype=dtype).item()

        def run(table: Tensor, ids: Tensor = ids, rounded: float = rounded) -> Tensor:
            return nn.functional.embedding(ids, table, padding_idx=padding_id) * rounded

        _, (want,) = oracle_gradients(run, (table.double(),), (dy.double(),))
        _, (stock,) = oracle_gradients(run, (table,), (dy,))
        dtable = guarded(V, N, dtype=dtype, device=device, stride=N + 8)
        embedding_backward(dy, ids, dtable.view, scale, padding_id=padding_id)
        dtable.check()
        accuracy.add("dtable", dtable.view, stock, want)
        before = random(V, N, dtype=dtype, device=device, seed=99, scale=10.0)
        added = before.clone()
        embedding_backward(dy, ids, added, scale, padding_id=padding_id, accumulate=True)
        accuracy.add("accumulated", added, before + stock, before.double() + want)
    accuracy.check()


def test_deterministic(device: torch.device) -> None:
    ids, table, dy = make(120, torch.bfloat16, device)

    def run() -> tuple[Tensor, Tensor]:
        dtable = torch.empty_like(table)
        embedding_backward(dy, ids, dtable, SCALE)
        return embedding_forward(ids, table, SCALE), dtable

    assert_deterministic(run)


def test_ids_outside_the_table(device: torch.device) -> None:
    ids, table, dy = make(4, torch.bfloat16, device)
    ids = torch.tensor([1, V, -1, 2], device=device)
    y = embedding_forward(ids, table)
    assert y[1:3].isnan().all()
    assert torch.equal(y[::3], table[1:3])
    dtable = torch.empty_like(table)
    embedding_backward(dy, ids, dtable)
    assert torch.equal(dtable[1:3], dy[::3])
    assert dtable.count_nonzero() == dtable[1:3].count_nonzero()


def test_ids_outside_the_table_on_a_cpu() -> None:
    with pytest.raises(IndexError):
        embedding_forward(torch.tensor([V]), torch.zeros(V, 4))


@pytest.mark.parametrize("padding_id", [None, 1])
def test_autograd(device: torch.device, padding_id: int | None) -> None:
    ids, table, dy = make(12, torch.float32, device)
    ids, dy = ids.view(3, 4), dy.view(3, 4, N)

    def stock(table: Tensor) -> Tensor:
        return nn.functional.embedding(ids, table, padding_idx=padding_id) * SCALE

    got = oracle_gradients(lambda table: embedding(ids, table, SCALE, padding_id=padding_id), (table,), (dy,))
    want = oracle_gradients(stock, (table,), (dy,))
    for a, b in zip(got[0] + got[1], want[0] + want[1]):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
    assert not embedding(ids, table).requires_grad  # frozen: no node, no gradient


@interpreted
@settings(max_examples=15, deadline=None, derandomize=True)
@given(
    ids=st.lists(st.integers(0, 30), max_size=12),
    features=st.integers(1, 300),
    padding_id=st.one_of(st.none(), st.integers(0, 30)),
)
def test_any_shape(ids: list[int], features: int, padding_id: int | None) -> None:
    """Kernels against the reference, on the CPU."""
    tokens = torch.tensor(ids, dtype=torch.int64)
    table = random(31, features, dtype=torch.float32, device=CPU, seed=1)
    dy = random(len(ids), features, dtype=torch.float32, device=CPU, seed=2)
    results = []
    for enabled in (True, False):
        with kernels_on_cpu(enabled):
            dtable = torch.full_like(table, float("nan"))
            embedding_backward(dy, tokens, dtable, 3.0, padding_id=padding_id)
            results.append((embedding_forward(tokens, table, 3.0), dtable))
    assert torch.equal(results[0][0], results[1][0])
    torch.testing.assert_close(results[0][1], results[1][1], rtol=1e-5, atol=1e-5)


@interpreted
def test_supported_says_why() -> None:
    ids, table = torch.zeros(3, dtype=torch.int64), torch.zeros(5, 8)
    assert supported(ids, table) == "kernels need a GPU"
    with kernels_on_cpu():
        assert supported(ids, table, torch.zeros(3, 8)) is None
        assert "float32" in str(supported(ids.float(), table))
        assert "float64" in str(supported(ids, table.double()))
        assert "not contiguous" in str(supported(ids, torch.zeros(8, 5).t()))
        assert "not on cpu" in str(supported(ids, table, torch.zeros(3, 8, device="meta")))


def test_launches() -> None:
    assert EmbeddingLaunch.gather(4096) == EmbeddingLaunch(4096, 8)
    assert EmbeddingLaunch.gather(576).block_n == 1024
    assert EmbeddingLaunch.scatter(64) == EmbeddingLaunch(64, 1)
    assert EmbeddingLaunch.scatter(4096) == EmbeddingLaunch(2048, 4)


@pytest.mark.gpu
@pytest.mark.parametrize("scale", [None, 3584**0.5])
@pytest.mark.parametrize("dtype", DTYPES)
def test_table_in_host_memory(dtype: torch.dtype, scale: float | None) -> None:
    device = torch.device("cuda", torch.cuda.current_device())
    ids, table, dy = make(300, dtype, device)
    expected = reference(ids, table, scale)
    pinned, pageable = table.cpu().pin_memory(), table.cpu()
    assert supported(ids, pinned) is None
    assert "pageable" in str(supported(ids, pageable))
    out = guarded(300, N, dtype=dtype, device=device)
    embedding_forward(ids, pinned, scale, out=out.view)
    out.check()
    assert torch.equal(out.view, expected)
    assert torch.equal(embedding_forward(ids, pageable, scale), expected)
    _, (want,) = oracle_gradients(lambda t: embedding(ids, t, scale), (table,), (dy,))
    for host in (pinned, pageable):
        leaf = host.detach().requires_grad_()
        embedding(ids, leaf, scale).backward(dy)
        assert leaf.grad is not None
        assert leaf.grad.device == CPU
        torch.testing.assert_close(leaf.grad, want.cpu(), rtol=1e-2, atol=1e-2)


@pytest.mark.gpu
def test_host_table_in_a_cuda_graph() -> None:
    device = torch.device("cuda", torch.cuda.current_device())
    ids, table, _ = make(64, torch.bfloat16, device)
    pinned = table.cpu().pin_memory()
    out = embedding_forward(ids, pinned)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        embedding_forward(ids, pinned, out=out)
    ids.copy_(ids.flip(0))
    graph.replay()
    assert torch.equal(out, reference(ids, table))


@pytest.mark.gpu
def test_more_than_2_31_elements() -> None:
    rows, features, device = 2**19 + 3, 4096, torch.device("cuda", torch.cuda.current_device())
    table = torch.randn(rows, features, dtype=torch.bfloat16, device=device)
    ids = torch.tensor([rows - 1, 0, rows - 1], device=device)
    y = embedding_forward(ids, table)
    assert torch.equal(y, table[ids])
    embedding_backward(y, ids, table)
    torch.testing.assert_close(table[-1], (y[0].float() * 2).to(torch.bfloat16))
    assert table.count_nonzero() == table[:: rows - 1].count_nonzero()
