from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from pyralis.ops import lora_grad_b
from pyralis.ops._triton import Gpu, kernels_on_cpu
from pyralis.ops.lora_grad_b import grad_B
from pyralis.ops.lora_group import LoraGroup, LoraProjection
from pyralis.ops.lora_tiles import DotLaunch, Tile
from tests.ops.harness import Accuracy, assert_deterministic, guarded, interpreted, random

CPU = torch.device("cpu")
GROUPS = {
    "one": LoraGroup(48, (LoraProjection(520, 16, 0.5),)),
    "q k v": LoraGroup(48, (LoraProjection(70, 3, 1.7), LoraProjection(20, 3, 1.7), LoraProjection(33, 3, 1.7))),
    "q v": LoraGroup(48, (LoraProjection(70, 8, 1.7), LoraProjection(20), LoraProjection(33, 8, 1.7))),
    "several ranks": LoraGroup(
        48, (LoraProjection(70, 24, 1.7), LoraProjection(20, 40), LoraProjection(33, 1, 2.0, 0.1))
    ),
    "four": LoraGroup(48, (LoraProjection(24, 2),) * 4),
    "rank 32": LoraGroup(48, (LoraProjection(300, 32), LoraProjection(300, 32))),
}


def inputs(
    group: LoraGroup, T: int, dtype: torch.dtype, device: torch.device, seed: int
) -> tuple[Tensor, list, Tensor]:
    """(dy in wide rows, B_j, xa)"""
    N, P = group.out_features, group.pad
    dy = random(T, N + P, dtype=dtype, device=device, seed=seed)[:, :N]
    B = [
        random(p.out_features, p.rank, dtype=dtype, device=device, seed=seed + j + 1, scale=p.out_features**-0.5)
        if p.rank
        else None
        for j, p in enumerate(group.projections)
    ]
    return dy, B, random(T, P, dtype=dtype, device=device, seed=seed + 9)


def by_products(group: LoraGroup, dy: Tensor, B: list, xa: Tensor, alphas: list[float]) -> tuple[Tensor, list[Tensor]]:
    """(t, dB_j), each product rounded to the dtype."""
    t, dB = [], []
    for j in group.adapted:
        part = dy[:, group.rows[j]]
        t.append((part * alphas[j]) @ B[j])
        dB.append(part.t() @ xa[:, group.columns[j]])
    return torch.cat(t, 1), dB


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", GROUPS)
def test_against_products(device: torch.device, name: str, dtype: torch.dtype) -> None:
    group, T, accuracy = GROUPS[name], 77, Accuracy()
    for seed in (0, 100):
        dropout = seed > 0
        alphas = [p.scale * (p.keep_scale if dropout else 1) for p in group.projections]
        dy, B, xa = inputs(group, T, dtype, device, seed)
        stock = by_products(group, dy, B, xa, alphas)
        oracle = by_products(group, dy.double(), [b if b is None else b.double() for b in B], xa.double(), alphas)
        t = guarded(T, group.pad, dtype=dtype, device=device, stride=group.pad + 5)
        copy = guarded(T, group.out_features, dtype=dtype, device=device, stride=group.out_features + 3)
        dB = [
            guarded(p.out_features, p.rank, dtype=torch.float32, device=device) if p.rank else None
            for p in group.projections
        ]
        views = [b if b is None else b.view for b in dB]
        grad_B(group, dy, B, xa, t.view, views, dropout=dropout, copy=copy.view)
        for buffer in (t, copy, *(b for b in dB if b is not None)):
            buffer.check()
        assert torch.equal(copy.view, dy)
        assert not t.view[:, group.rank :].any()
        accuracy.add("t", t.view[:, : group.rank], stock[0], oracle[0])
        once = [view for view in views if view is not None]
        for j, view, a, b in zip(group.adapted, once, stock[1], oracle[1]):
            accuracy.add(f"dB {j}", view, a.float(), b)
        before = [view.clone() for view in once]
        grad_B(group, dy, B, xa, t.view, views, dropout=dropout, accumulate=True)
        for view, value in zip(once, before):
            torch.testing.assert_close(view, 2 * value, rtol=1e-5, atol=1e-5)
    accuracy.check()


def test_frozen_and_strided_B(device: torch.device) -> None:
    """Frozen B, or B between W's rows: the same numbers."""
    group = GROUPS["q k v"]
    dy, B, xa = inputs(group, 20, torch.bfloat16, device, 3)
    t, expected = (torch.empty(20, group.pad, dtype=dy.dtype, device=device) for _ in range(2))
    dB = [torch.empty(b.shape, device=device) for b in B]
    grad_B(group, dy, B, xa, expected, dB, dropout=False)
    wide = torch.zeros(group.out_features, 16, dtype=dy.dtype, device=device)
    for j, b in enumerate(B):
        wide[group.rows[j], 8 + 2 * j : 11 + 2 * j] = b
        beside = [b if i != j else wide[group.rows[j], 8 + 2 * j : 11 + 2 * j] for i, b in enumerate(B)]
        again = [torch.empty_like(b) for b in dB]
        grad_B(group, dy, beside, xa, t, again, dropout=False)
        torch.testing.assert_close(t, expected, rtol=1e-2, atol=1e-2)
        for a, b in zip(again, dB):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
    half = [dB[0].clone(), None, dB[2].clone()]
    for frozen in ([], half):
        grad_B(group, dy, B, xa, t, frozen, dropout=False)
        torch.testing.assert_close(t, expected, rtol=1e-2, atol=1e-2)
    torch.testing.assert_close(half[0], dB[0], rtol=1e-4, atol=1e-4)


def test_deterministic_over_splits(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    group, T = GROUPS["q k v"], 600
    dy, B, xa = inputs(group, T, torch.bfloat16, device, 0)
    results = []

    def run() -> tuple[Tensor, ...]:
        t = torch.empty(T, group.pad, dtype=dy.dtype, device=device)
        dB = [torch.empty(b.shape, device=device) for b in B]
        grad_B(group, dy, B, xa, t, dB, dropout=False)
        return t, *dB

    for sm_count in (1, 132):
        monkeypatch.setattr(lora_grad_b, "gpu_of", lambda _, n=sm_count: Gpu((8, 0), n))
        assert_deterministic(run)
        results.append(run())
    assert torch.equal(results[0][0], results[1][0])
    for a, b in zip(*results):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


@interpreted
@settings(max_examples=8, deadline=None, derandomize=True)
@given(
    T=st.integers(1, 70),
    sizes=st.lists(st.integers(1, 90), min_size=1, max_size=4),
    rank=st.integers(1, 32),
    tile=st.sampled_from([Tile(16, 32, 4), Tile(32, 16, 4, 2), Tile(64, 64, 4)]),
)
def test_any_shape_and_launch(T: int, sizes: list[int], rank: int, tile: Tile) -> None:
    group, results = LoraGroup(16, tuple(LoraProjection(n, rank, 1.3) for n in sizes)), []
    dy, B, xa = inputs(group, T, torch.float16, CPU, T)
    plan = replace(DotLaunch.of(rank), grad_B=tile)
    for enabled in (True, False):
        with kernels_on_cpu(enabled), pytest.MonkeyPatch.context() as patch:
            patch.setattr(DotLaunch, "of", lambda rank: plan)
            patch.setattr(lora_grad_b, "_parts", lora_grad_b._parts.__wrapped__)
            t, dB = torch.full((T, group.pad), torch.nan).half(), [torch.full(b.shape, torch.nan) for b in B]
            grad_B(group, dy, B, xa, t, dB, dropout=False)
            results.append((t.float(), *dB))
    for a, b in zip(*results):
        torch.testing.assert_close(a, b, rtol=5e-3, atol=5e-3)
