"""`ops/_head.py`: chunks, rows left out, scaled rows."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pyralis.ops._head import CPU_CHUNK_BYTES, HeadChunks, SupervisedRows, bucket, scale_in_place, scaled_rows
from pyralis.ops._loss import IGNORE_INDEX
from tests.ops.harness import guarded, random


def test_chunks_at_real_sizes() -> None:
    assert HeadChunks.of(4096, 128256, 2, 512 << 20) == HeadChunks(4096, 2048, 128256)
    assert HeadChunks.of(4100, 128256, 2, 512 << 20) == HeadChunks(4100, 1408, 128256)
    assert HeadChunks.of(300, 32003, 2, 512 << 20) == HeadChunks(300, 300, 32064)


@pytest.mark.parametrize(
    ("rows", "dtype", "trained", "step"),
    [
        (4096, torch.bfloat16, False, 2048),
        (8192, torch.bfloat16, True, 8192),  # the logits take what a float32 gradient would have taken on top
        (8320, torch.bfloat16, True, 2816),
        (8192, torch.float16, True, 4096),  # the gradient is float32 in any case
        (4096, torch.float32, True, 4096),
        (8192, torch.float32, True, 4096),
    ],
)
def test_a_trained_head_takes_larger_chunks(rows: int, dtype: torch.dtype, trained: bool, step: int) -> None:
    hidden, weight = (torch.empty(n, 4096, dtype=dtype, device="meta") for n in (rows, 128256))
    assert HeadChunks.for_head(hidden, weight, None, trained=trained).step == step
    assert HeadChunks.for_head(hidden, weight, 256 << 20, trained=trained).step * 128256 * dtype.itemsize <= 256 << 20


def test_chunks_on_a_cpu() -> None:
    hidden, weight = torch.empty(4096, 8), torch.empty(32000, 8)
    for trained in (False, True):
        chunks = HeadChunks.for_head(hidden, weight, None, trained=trained)
        assert chunks == HeadChunks.of(4096, 32000, 4, CPU_CHUNK_BYTES)


@given(
    rows=st.integers(0, 10_000), vocab=st.integers(1, 260_000), itemsize=st.sampled_from([2, 4]),
    chunk_bytes=st.integers(1, 1 << 30),
)  # fmt: skip
def test_chunks_cover_the_rows_within_the_budget(rows: int, vocab: int, itemsize: int, chunk_bytes: int) -> None:
    chunks = HeadChunks.of(rows, vocab, itemsize, chunk_bytes)
    assert [i for part in chunks.parts() for i in range(part.start, part.stop)] == list(range(rows))
    assert chunks.stride >= vocab
    assert chunks.step == 1 or chunks.step * chunks.stride * itemsize <= chunk_bytes


@given(rows=st.integers(0, 1_000_000))
def test_buckets_are_few_and_close(rows: int) -> None:
    size = bucket(rows)
    assert rows <= size <= max(rows * 9 / 8, rows + 127)
    assert bucket(size) == size


def test_at_most_eight_buckets_an_octave() -> None:
    assert len({bucket(n) for n in range(4097, 8193)}) == 8


@given(labels=st.lists(st.sampled_from([IGNORE_INDEX, 0, 3]), max_size=300), told=st.integers(0, 300))
def test_supervised_rows(labels: list[int], told: int) -> None:
    found = SupervisedRows.of(torch.tensor(labels, dtype=torch.int64), told)
    if found is None:
        assert bucket(told) >= len(labels)
        return
    kept = [i for i, label in enumerate(labels) if label != IGNORE_INDEX]
    R = bucket(told)
    assert bool(found.poison.isnan()) is (len(kept) > R)
    if len(kept) <= R:
        unused = R - len(kept)
        assert found.index.tolist() == kept + [0] * unused
        assert found.labels.tolist() == [labels[i] for i in kept] + [IGNORE_INDEX] * unused
        places = {row: place for place, row in enumerate(kept)}
        assert found.place.tolist() == [places.get(i, R) for i in range(len(labels))]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("N", [24, 1500])
def test_scaled_rows(device: torch.device, N: int, dtype: torch.dtype) -> None:
    x = random(3, N, dtype=dtype, device=device, seed=0)
    factor = torch.tensor(2.0**-20 / 3, device=device)  # not a number of half precision
    place = torch.tensor([2, 3, 0, 3, 1], device=device)
    expected = torch.cat([x, torch.zeros_like(x[:1])])[place].double() * factor.double()
    for got, want in (
        (scaled_rows(x, factor, torch.float32, place), expected),
        (scaled_rows(x, factor, torch.float32), x.double() * factor.double()),
        (scaled_rows(x, None, torch.float32, place), expected / factor.double()),
    ):
        torch.testing.assert_close(got.double(), want, rtol=3e-7, atol=0)
    assert scaled_rows(x, None, dtype) is x
    rounded = scaled_rows(x, torch.tensor(1 / 3, device=device), dtype)
    torch.testing.assert_close(rounded.double(), x.double() / 3, rtol=0.6 * torch.finfo(dtype).eps, atol=1e-7)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("shape", [(3, 24), (5, 4097)])
def test_scale_in_place(device: torch.device, shape: tuple[int, int], dtype: torch.dtype) -> None:
    x = random(*shape, dtype=dtype, device=device, seed=0)
    for stride in (shape[1], shape[1] + 8):  # rows that lie apart go without the kernel
        buffer = guarded(*shape, dtype=dtype, device=device, stride=stride)
        buffer.view.copy_(x)
        scale_in_place(buffer.view, torch.ones((), device=device))
        assert torch.equal(buffer.view, x)
        scale_in_place(buffer.view, torch.tensor(1 / 3, device=device))
        buffer.check()
        torch.testing.assert_close(
            buffer.view.double(), x.double() * float(torch.tensor(1 / 3)), rtol=0.6 * torch.finfo(dtype).eps, atol=3e-8
        )
    scale_in_place(x, torch.tensor(float("nan"), device=device))
    assert x.isnan().all()
