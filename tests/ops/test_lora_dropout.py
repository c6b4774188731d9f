from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from pyralis.ops import lora_dropout, lora_tiles
from pyralis.ops._triton import Gpu, kernels_on_cpu
from pyralis.ops.dropout_mask import advance, masked, new_rng, reference
from pyralis.ops.lora_dropout import grad_splits, project, project_backward, project_splits
from pyralis.ops.lora_group import LoraGroup, LoraProjection, Run
from pyralis.ops.lora_tiles import DotLaunch, Tile, supported
from tests.ops.harness import Accuracy, assert_deterministic, guarded, interpreted, random

CPU = torch.device("cpu")
STREAM = 11


def make_run(features: int, rank: int, count: int, dropout: float = 0.2, scale: float = 1.7) -> Run:
    (run,) = LoraGroup(features, (LoraProjection(32, rank, scale, dropout),) * count).runs
    return run


def inputs(run: Run, T: int, K: int, dtype: torch.dtype, device: torch.device, seed: int) -> tuple[Tensor, ...]:
    """(x, A, t, dx so far), x and t in wide rows"""
    R = run.count * run.like.rank
    x = random(T, K + 24, dtype=dtype, device=device, seed=seed)[:, :K]
    A = random(R, K, dtype=dtype, device=device, seed=seed + 10, scale=K**-0.5)
    t = random(T, K + R, dtype=dtype, device=device, seed=seed + 20)[:, K:]
    return x, A, t, random(T, K, dtype=dtype, device=device, seed=seed + 30)


def by_formula(run: Run, x: Tensor, A: Tensor, t: Tensor, dx: Tensor, rng: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(xa, dA, dx) with explicit masks, every step rounded to x's dtype as PEFT's autograd would."""
    xa, dA, r = [], [], run.like.rank
    for j in range(run.count):
        a, tj = A[j * r : (j + 1) * r], t[:, j * r : (j + 1) * r]
        keep = reference(rng, STREAM + j, x.shape[0], x.shape[1], run.like.threshold)
        xd = (torch.where(keep, x, 0).double() * run.like.keep_scale).to(x.dtype)
        xa.append((xd @ a.t()) * run.like.scale)
        dA.append(tj.t() @ torch.where(keep, x, 0))
        dx = dx + torch.where(keep, tj @ a, 0)
    return torch.cat(xa, 1), torch.cat(dA), dx


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(
    ("T", "K", "rank", "count"), [(37, 136, 3, 2), (50, 72, 16, 3), (9, 72, 70, 1), (17, 24, 256, 1), (1, 8, 1, 1)]
)
def test_project_and_backward(
    device: torch.device, T: int, K: int, rank: int, count: int, dtype: torch.dtype
) -> None:  # fmt: skip
    accuracy, rng = Accuracy(), new_rng(3, device)
    run, R = make_run(K, rank, count), count * rank
    assert (supported(torch.zeros(1, 1, dtype=dtype, device=device)) is None) == (dtype != torch.float32)
    for seed in range(2):
        x, A, t, before = inputs(run, T, K, dtype, device, seed)
        zero = torch.zeros_like(before)
        oracle = by_formula(run, x.double(), A.double(), t.double(), zero.double(), rng)
        stock = by_formula(run, x, A, t, zero, rng)
        xa = guarded(T, R, dtype=dtype, device=device, stride=R + 9)
        project(run, x, A, rng, STREAM, xa.view)
        xa.check()
        dA = guarded(R, K, dtype=torch.float32, device=device)
        dx = guarded(T, K, dtype=dtype, device=device, stride=K + 9)
        project_backward(run, t, x, A, rng, STREAM, dx.view, dA.view)
        dA.check()
        dx.check()
        accuracy.add("xa", xa.view, stock[0], oracle[0])
        accuracy.add("dA", dA.view, stock[1].float(), oracle[1])
        accuracy.add("dx", dx.view, stock[2], oracle[2])

        once, frozen, added = dA.view.clone(), torch.full_like(dx.view, torch.nan), before.clone()
        project_backward(run, t, x, A, rng, STREAM, added, dA.view, add_dx=True, accumulate=True)
        torch.testing.assert_close(dA.view, 2 * once, rtol=1e-5, atol=1e-5)
        accuracy.add(
            "dx added to",
            added,
            by_formula(run, x, A, t, before, rng)[2],
            by_formula(run, *(v.double() for v in (x, A, t, before)), rng)[2],
        )
        project_backward(run, t, x, A, rng, STREAM, frozen, None)
        assert torch.equal(frozen, dx.view)
    accuracy.check()


def test_splits_sum_to_the_whole(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """Many SMs: K is split in the forward, T in the backward, into parts that do not divide them."""
    T, K, run = 260, 264, make_run(264, 4, 2)
    rng, (x, A, t, before) = new_rng(1, device), inputs(run, T, K, torch.bfloat16, device, 0)
    results = []
    for sm_count in (1, 132):
        monkeypatch.setattr(lora_dropout, "gpu_of", lambda _, n=sm_count: Gpu((8, 0), n))
        xa, dA, dx = torch.empty(T, 8, device=device).bfloat16(), torch.empty(8, K, device=device), before.clone()
        project(run, x, A, rng, STREAM, xa)
        project_backward(run, t, x, A, rng, STREAM, dx, dA)
        results.append((xa, dA, dx))
    plan = DotLaunch.of(4)
    assert project_splits(plan, run, T, K, 132) == 2
    assert grad_splits(plan, run, T, K, 132) == 3
    torch.testing.assert_close(results[0][0], results[1][0], rtol=1e-2, atol=1e-3)
    torch.testing.assert_close(results[0][1], results[1][1], rtol=1e-4, atol=1e-4)
    assert torch.equal(results[0][2], results[1][2])


def test_deterministic(device: torch.device) -> None:
    run, rng = make_run(300, 8, 2), new_rng(5, device)
    x, A, t, before = inputs(run, 70, 300, torch.bfloat16, device, 0)

    def outputs() -> tuple[Tensor, ...]:
        xa, dA, dx = t.clone(memory_format=torch.contiguous_format), torch.empty_like(A).float(), before.clone()
        project(run, x, A, rng, STREAM, xa)
        project_backward(run, t, x, A, rng, STREAM, dx, dA)
        return xa, dA, dx

    assert_deterministic(outputs)


@interpreted
@settings(max_examples=8, deadline=None, derandomize=True)
@given(
    T=st.integers(0, 40),
    K=st.integers(1, 150),
    rank=st.integers(1, 20),
    count=st.integers(1, 4),
    together=st.integers(1, 3),
    tile=st.sampled_from([Tile(16, 32, 4), Tile(32, 16, 4, 2), Tile(64, 64, 4)]),
    add_dx=st.booleans(),
)
def test_any_shape_and_launch(T: int, K: int, rank: int, count: int, together: int, tile: Tile, add_dx: bool) -> None:
    """The kernels with `tl.dot` against cuBLAS's way, on the CPU; also four projections, more than a program serves."""
    tile = replace(tile, resident=(16,) * together)
    plan = replace(DotLaunch.of(rank), project=tile, grad=tile)
    run, rng = make_run(K, rank, count, dropout=0.4), new_rng(T, CPU)
    x, A, t, before = inputs(run, T, K, torch.float16, CPU, K)
    results = []
    for enabled in (True, False):
        with kernels_on_cpu(enabled), pytest.MonkeyPatch.context() as patch:
            patch.setattr(DotLaunch, "of", lambda rank: plan)
            xa, dA, dx = torch.full((T, count * rank), torch.nan).half(), torch.full(A.shape, torch.nan), before.clone()
            project(run, x, A, rng, STREAM, xa)
            project_backward(run, t, x, A, rng, STREAM, dx, dA, add_dx=add_dx)
            results.append((xa.float(), dA, dx.float()))
    for a, b in zip(*results):
        torch.testing.assert_close(a, b, rtol=5e-3, atol=2e-2)


@interpreted
def test_supported_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.zeros(2, 8, dtype=torch.bfloat16)
    assert supported(x) == "kernels need a GPU"
    with kernels_on_cpu():
        assert supported(x) is None
        assert "float32" in str(supported(x.float()))
        monkeypatch.setattr(lora_tiles, "gpu_of", lambda _: Gpu((7, 5), 40))
        assert "8.0" in str(supported(x))


@pytest.mark.gpu
def test_a_graph_replay_draws_new_masks() -> None:
    device, K = torch.device("cuda"), 256
    run, rng = make_run(K, 8, 2), new_rng(5, device)
    x, A, _, _ = inputs(run, 64, K, torch.bfloat16, device, 0)
    xa = torch.empty(64, 16, dtype=torch.bfloat16, device=device)
    project(run, x, A, rng, STREAM, xa)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        advance(rng)
        project(run, x, A, rng, STREAM, xa)
    seen = []
    for draw in (1, 2):
        graph.replay()
        expected = torch.empty_like(xa)
        project(run, x, A, torch.tensor([5, draw], device=device), STREAM, expected)
        assert torch.equal(xa, expected)
        seen.append(expected)
    assert not torch.equal(*seen)


@pytest.mark.gpu
def test_more_than_2_31_elements() -> None:
    T, K, device = 2**19 + 3, 4096, torch.device("cuda")
    run, rng = make_run(K, 8, 1), new_rng(5, device)
    x = torch.randn(T, K, dtype=torch.bfloat16, device=device)
    out = masked(x, rng, STREAM, run.like.threshold, torch.empty_like(x))
    tail = slice(T - 64, T)
    keep = (out[tail] != 0) | (x[tail] == 0)
    A = random(8, K, dtype=torch.bfloat16, device=device, seed=0)
    xa = torch.empty(T, 8, dtype=torch.bfloat16, device=device)
    project(run, x, A, rng, STREAM, xa)
    alpha = run.like.scale * run.like.keep_scale
    torch.testing.assert_close(
        xa[tail].float(), (torch.where(keep, x[tail], 0).float() @ A.float().t()) * alpha, rtol=2e-2, atol=2e-1
    )
