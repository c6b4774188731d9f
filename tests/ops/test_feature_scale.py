from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from pyralis.ops._triton import kernels_on_cpu
from pyralis.ops.feature_scale import ScaleLaunch, feature_scale, feature_scale_backward, reference
from tests.ops.harness import Accuracy, assert_deterministic, guarded, interpreted, oracle_gradients, random

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def inputs(T: int, N: int, dtype: torch.dtype, device: torch.device, seed: int) -> tuple[Tensor, ...]:
    """u, dy, magnitude, norm, bias, residual"""
    u, dy, residual = (random(T, N, dtype=dtype, device=device, seed=seed + i) for i in range(3))
    magnitude, norm = (
        1 + random(N, dtype=torch.float32, device=device, seed=seed + i, scale=0.3).abs() for i in (3, 4)
    )
    return u, dy, magnitude, norm, random(N, dtype=dtype, device=device, seed=seed + 5), residual


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("T", "N"), [(1, 8), (37, 200), (70, 300), (3, 1100)])
def test_forward_and_backward(device: torch.device, T: int, N: int, dtype: torch.dtype) -> None:
    accuracy = Accuracy()
    for seed in (0, 10, 20):
        u, dy, magnitude, norm, bias, residual = inputs(T, N, dtype, device, seed)

        def run(u: Tensor, m: Tensor, n: Tensor = norm, b: Tensor = bias, r: Tensor = residual) -> Tensor:
            return reference(u, m / n.to(m.dtype), bias=b.to(u.dtype), residual=r.to(u.dtype)).to(u.dtype)

        oracle = oracle_gradients(run, (u.double(), magnitude.double()), (dy.double(),))
        stock = oracle_gradients(run, (u, magnitude), (dy,))
        ratio, y = magnitude / norm, guarded(T, N, dtype=dtype, device=device, stride=N + 5)
        feature_scale(u, ratio, bias=bias, residual=residual, out=y.view)
        y.check()
        du, dm = guarded(T, N, dtype=dtype, device=device, stride=N + 3), guarded(N, dtype=torch.float32, device=device)
        feature_scale_backward(dy, ratio, u, norm, dm.view, out=du.view)
        du.check()
        dm.check()
        accuracy.add("y", y.view, stock[0][0], oracle[0][0])
        accuracy.add("du", du.view, stock[1][0], oracle[1][0])
        accuracy.add("dm", dm.view, stock[1][1], oracle[1][1])
    accuracy.check()


def test_in_place(device: torch.device) -> None:
    u, dy, magnitude, norm, _, residual = inputs(20, 40, torch.bfloat16, device, 0)
    ratio, dm = magnitude / norm, torch.empty_like(norm)
    y, du = feature_scale(u, ratio, residual=residual), feature_scale_backward(dy, ratio)
    assert torch.equal(feature_scale(u, ratio, residual=residual, out=residual), y)
    assert torch.equal(feature_scale_backward(dy, ratio, u, norm, dm, out=dy), du)
    assert torch.equal(feature_scale(u, ratio, out=u), u)


def test_the_reference_sums_some_rows_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    u, dy, magnitude, norm, _, _ = inputs(9, 12, torch.float64, torch.device("cpu"), 0)
    norm, want = norm.double(), (dy * u).sum(0) / norm.double()
    for elements in (1, 40, 1 << 24):
        monkeypatch.setattr("pyralis.ops.feature_scale.CHUNK_ELEMENTS", elements)
        dm = torch.full_like(norm, float("nan"))
        feature_scale_backward(dy, magnitude.double() / norm, u, norm, dm)
        torch.testing.assert_close(dm, want)


def test_determinism(device: torch.device) -> None:
    u, dy, magnitude, norm, bias, _ = inputs(140, 40, torch.bfloat16, device, 0)

    def run() -> list[Tensor]:
        dm = torch.empty_like(norm)
        return [
            feature_scale(u, magnitude, bias=bias), feature_scale_backward(dy, magnitude, u, norm, dm), dm
        ]  # fmt: skip

    assert_deterministic(run)


@interpreted
@settings(max_examples=12, deadline=None)
@given(T=st.integers(0, 70), N=st.integers(1, 300), seed=st.integers(0, 5))
def test_any_shape(T: int, N: int, seed: int) -> None:
    """Kernels against the reference."""
    u, dy, magnitude, norm, bias, _ = inputs(T, N, torch.float32, torch.device("cpu"), seed)
    results = []
    for enabled in (True, False):
        with kernels_on_cpu(enabled):
            dm = torch.empty_like(norm)
            results.append([feature_scale(u, magnitude, bias=bias), feature_scale_backward(dy, norm, u, norm, dm), dm])
    for a, b in zip(*results):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def test_launches_cover_all_tokens() -> None:
    for tokens, features in ((1, 8), (4096, 28672), (100_000, 4096), (65, 300)):
        plan = ScaleLaunch.of(tokens, features, 132)
        assert 1 <= plan.chunks <= max(1, -(-tokens // 64))
