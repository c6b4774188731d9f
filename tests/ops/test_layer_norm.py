from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from pyralis.ops._triton import kernels_on_cpu
from pyralis.ops.layer_norm import (
    layer_norm,
    layer_norm_backward,
    layer_norm_forward,
    reference,
    reference_backward,
    supported,
)
from tests.ops.harness import Accuracy, assert_deterministic, guarded, interpreted, oracle_gradients, random

EPS = 1e-5
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def inputs(T: int, N: int, dtype: torch.dtype, device: torch.device, seed: int) -> tuple[Tensor, ...]:
    """(x away from mean 0, weight, bias, dy)"""
    x = (0.5 + random(T, N, dtype=torch.float32, device=device, seed=seed, scale=2.0)).to(dtype)
    weight = (1 + random(N, dtype=torch.float32, device=device, seed=seed + 100, scale=0.2)).to(dtype)
    bias = random(N, dtype=dtype, device=device, seed=seed + 150)
    return x, weight, bias, random(T, N, dtype=dtype, device=device, seed=seed + 200)


def run(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return reference(x, weight, bias, EPS)


def test_reference_backward_is_the_derivative() -> None:
    x, weight, bias, dy = inputs(4, 33, torch.float64, torch.device("cpu"), 0)
    mean, rstd = x.mean(-1), torch.rsqrt(x.var(-1, correction=0) + EPS)
    _, expected = oracle_gradients(run, (x, weight, bias), (dy,))
    for got, want in zip(reference_backward(dy, x, weight, mean, rstd), expected):
        torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("T", "N"), [(5, 64), (3, 200), (7, 961), (11, 2100), (3, 8200)])
def test_forward_and_backward(device: torch.device, T: int, N: int, dtype: torch.dtype) -> None:
    accuracy = Accuracy()
    for seed in range(3):
        x, weight, bias, dy = inputs(T, N, dtype, device, seed)
        oracle_y, oracle = oracle_gradients(run, [t.double() for t in (x, weight, bias)], (dy.double(),))
        stock_y, stock = oracle_gradients(run, (x, weight, bias), (dy,))
        out = guarded(T, N + 16, dtype=dtype, device=device, stride=N + 19)
        y, _, mean, rstd = layer_norm_forward(x, weight, bias, EPS, out=out.view)
        out.check()
        assert torch.equal(out.view[:, N:], torch.zeros_like(out.view[:, N:]))
        dx = guarded(T, N, dtype=dtype, device=device, stride=N + 5)
        dweight, dbias = (guarded(N, dtype=dtype, device=device) for _ in range(2))
        layer_norm_backward(dy, x, weight, mean, rstd, out=dx.view, dweight=dweight.view, dbias=dbias.view)
        accuracy.add("y", y, stock_y[0], oracle_y[0])
        for name, buffer, s, o in zip(("dx", "dweight", "dbias"), (dx, dweight, dbias), stock, oracle):
            buffer.check()
            accuracy.add(name, buffer.view, s, o)
    accuracy.check()


@pytest.mark.parametrize("stream", [torch.float32, torch.bfloat16])
def test_residual(device: torch.device, stream: torch.dtype) -> None:
    x, weight, bias, dy = inputs(5, 200, torch.bfloat16, device, 0)
    residual = random(5, 200, dtype=stream, device=device, seed=7, scale=3.0)
    residual_grad = random(5, 200, dtype=stream, device=device, seed=8)
    h_out = guarded(5, 200, dtype=stream, device=device, stride=203)
    y, h, mean, rstd = layer_norm_forward(
        x, weight, bias, EPS, residual=residual, h_out=h_out.view, out=torch.empty_like(x)
    )
    h_out.check()
    assert torch.equal(h, (x + residual).to(stream))
    double = [t.double() for t in (h, weight, bias)]
    oracle_y, oracle = oracle_gradients(run, double, (dy.double(),))
    stock_y, stock = oracle_gradients(run, (h, weight, bias), (dy,))
    accuracy = Accuracy()
    accuracy.add("y", y, stock_y[0].to(y.dtype), oracle_y[0])
    dx = layer_norm_backward(dy, h, weight, mean, rstd, residual_grad=residual_grad)
    accuracy.add("dx", dx, stock[0] + residual_grad, oracle[0] + residual_grad.double())
    accuracy.check()
    assert torch.equal(
        layer_norm_backward(dy, h, weight, mean, rstd, residual_grad=residual_grad, out=residual_grad), dx
    )


@pytest.mark.parametrize("N", [72, 2100, 8200])
@pytest.mark.parametrize("trained", [(True, True), (True, False), (False, True)])
def test_any_of_the_weights_in_place(device: torch.device, trained: tuple[bool, bool], N: int) -> None:
    """More rows than programs; dx over dy; each output asked for alone is the one that comes with the others."""
    x, weight, bias, dy = inputs(150 if N == 72 else 9, N, torch.bfloat16, device, 0)
    residual_grad = random(len(x), N, dtype=torch.float32, device=device, seed=3)
    _, _, mean, rstd = layer_norm_forward(x, weight, bias, EPS)
    dx_want = layer_norm_backward(dy, x, weight, mean, rstd, residual_grad=residual_grad)
    want = reference_backward(dy.double(), x.double(), weight.double(), mean.double(), rstd.double())[1:]
    buffers = [guarded(N, dtype=torch.float32, device=device) if t else None for t in trained]
    dweight, dbias = (None if b is None else b.view for b in buffers)
    over_x, sums = x.clone(), [None if b is None else torch.empty_like(b.view) for b in buffers]
    layer_norm_backward(
        dy, over_x, weight, mean, rstd, residual_grad=residual_grad, out=over_x, dweight=sums[0], dbias=sums[1]
    )  # fmt: skip
    layer_norm_backward(dy, x, weight, mean, rstd, residual_grad=residual_grad, out=dy, dweight=dweight, dbias=dbias)
    assert torch.equal(over_x, dy)
    assert all(a is None or b is None or torch.equal(a, b) for a, b in zip(sums, (dweight, dbias)))
    torch.testing.assert_close(dy, dx_want, rtol=2**-7, atol=1e-5)  # another order of operations: an ulp of bfloat16
    for buffer, expected in zip(buffers, want):
        if buffer is not None:
            buffer.check()
            torch.testing.assert_close(buffer.view, expected.float(), rtol=1e-5, atol=1e-4)


def test_deterministic(device: torch.device) -> None:
    x, weight, bias, dy = inputs(70, 520, torch.bfloat16, device, 0)

    def once() -> tuple[Tensor, ...]:
        y, _, mean, rstd = layer_norm_forward(x, weight, bias, EPS)
        dweight, dbias = torch.empty_like(weight), torch.empty_like(bias)
        dx = layer_norm_backward(dy, x, weight, mean, rstd, dweight=dweight, dbias=dbias)
        return y, mean, rstd, dx, dweight, dbias

    assert_deterministic(once)


def test_autograd(device: torch.device) -> None:
    x, weight, bias, dy = inputs(6, 72, torch.float32, device, 0)
    args, grads = (x.view(2, 3, 72), weight, bias), (dy.view(2, 3, 72),)
    got = oracle_gradients(lambda *a: layer_norm(*a, EPS), args, grads)
    want = oracle_gradients(run, args, grads)
    for a, b in zip(got[0] + got[1], want[0] + want[1]):
        torch.testing.assert_close(a, b, rtol=2e-5, atol=2e-5)
    without_bias = oracle_gradients(lambda x, w: layer_norm(x, w, None, EPS), args[:2], grads)
    torch.testing.assert_close(without_bias[0][0], got[0][0] - bias, rtol=2e-5, atol=2e-5)


@interpreted
@settings(max_examples=15, deadline=None, derandomize=True)
@given(T=st.integers(1, 9), N=st.integers(2, 300), pad=st.integers(0, 40), biased=st.booleans())
def test_any_shape(T: int, N: int, pad: int, biased: bool) -> None:
    x, weight, bias, dy = inputs(T, N, torch.float32, torch.device("cpu"), 0)
    results = []
    for enabled in (True, False):
        with kernels_on_cpu(enabled):
            out = torch.full((T, N + pad), float("nan"))
            _, _, mean, rstd = layer_norm_forward(x, weight, bias if biased else None, EPS, out=out)
            dweight, dbias = torch.empty_like(weight), torch.empty_like(bias)
            dx = layer_norm_backward(dy, x, weight, mean, rstd, dweight=dweight, dbias=dbias)
            results.append((out, mean, rstd, dx, dweight, dbias))
    for a, b in zip(*results):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


@interpreted
def test_supported_says_why() -> None:
    x, weight = torch.zeros(2, 8), torch.zeros(8)
    assert supported(x, weight) == "kernels need a GPU"
    with kernels_on_cpu():
        assert supported(x, weight) is None
        assert "registers" in str(supported(torch.zeros(1, 40000), torch.zeros(40000)))
