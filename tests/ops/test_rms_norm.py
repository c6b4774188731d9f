from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers.models.gemma.modeling_gemma import GemmaRMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from pyralis.ops._norm import RowLaunch
from pyralis.ops._triton import kernels_on_cpu
from pyralis.ops.rms_norm import (
    add_rms_norm,
    reference,
    reference_backward,
    rms_norm,
    rms_norm_backward,
    rms_norm_forward,
    supported,
)
from tests.ops.harness import Accuracy, assert_deterministic, guarded, interpreted, oracle_gradients, random

EPS = 1e-5
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
SHAPES = ((5, 64), (3, 200), (7, 961), (2, 4096))


def inputs(T: int, N: int, dtype: torch.dtype, device: torch.device, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """(x, weight around 1, dy)"""
    x = random(T, N, dtype=dtype, device=device, seed=seed, scale=2.0)
    weight = (1 + random(N, dtype=torch.float32, device=device, seed=seed + 100, scale=0.2)).to(dtype)
    return x, weight, random(T, N, dtype=dtype, device=device, seed=seed + 200)


def stock(N: int, unit_offset: bool, weight: Tensor) -> torch.nn.Module:
    module = GemmaRMSNorm(N, eps=EPS) if unit_offset else LlamaRMSNorm(N, eps=EPS)
    module.weight = torch.nn.Parameter(weight.clone(), requires_grad=False)
    return module.to(weight.device)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("unit_offset", [False, True])
def test_reference_is_stock(dtype: torch.dtype, unit_offset: bool) -> None:
    x, weight, _ = inputs(3, 96, dtype, torch.device("cpu"), 0)
    assert torch.equal(reference(x, weight, EPS, unit_offset=unit_offset), stock(96, unit_offset, weight)(x))


@pytest.mark.parametrize("unit_offset", [False, True])
def test_reference_backward_is_the_derivative(unit_offset: bool) -> None:
    x, weight, dy = inputs(4, 33, torch.float64, torch.device("cpu"), 0)
    rstd = torch.rsqrt(x.square().mean(-1) + EPS)
    _, expected = oracle_gradients(lambda x, w: reference(x, w, EPS, unit_offset=unit_offset), (x, weight), (dy,))
    for got, want in zip(reference_backward(dy, x, weight, rstd, unit_offset=unit_offset), expected):
        torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("unit_offset", [False, True])
@pytest.mark.parametrize(("T", "N"), SHAPES)
def test_forward_and_backward(device: torch.device, T: int, N: int, unit_offset: bool, dtype: torch.dtype) -> None:
    accuracy = Accuracy()
    for seed in range(3):
        x, weight, dy = inputs(T, N, dtype, device, seed)

        def run(x: Tensor, w: Tensor) -> Tensor:
            return reference(x, w, EPS, unit_offset=unit_offset)

        oracle_y, oracle = oracle_gradients(run, (x.double(), weight.double()), (dy.double(),))
        stock_y, stock_grads = oracle_gradients(run, (x, weight), (dy,))
        y, _, rstd = rms_norm_forward(x, weight, EPS, unit_offset=unit_offset)
        dweight = torch.full_like(weight, float("nan"))
        dx = rms_norm_backward(dy, x, weight, rstd, unit_offset=unit_offset, dweight=dweight)
        accuracy.add("y", y, stock_y[0], oracle_y[0])
        accuracy.add("dx", dx, stock_grads[0], oracle[0])
        accuracy.add("dweight", dweight, stock_grads[1], oracle[1])
        frozen = rms_norm_backward(dy, x, weight, rstd, unit_offset=unit_offset)
        accuracy.add("dx of a frozen norm", frozen, stock_grads[0], oracle[0])
    accuracy.check()


@pytest.mark.parametrize(
    ("branch", "stream", "half"),
    [
        (torch.bfloat16, torch.bfloat16, torch.bfloat16),
        (torch.bfloat16, torch.float32, torch.bfloat16),
        (torch.float16, torch.float32, torch.float16),
        (torch.float32, torch.float32, torch.float32),
    ],
)
def test_residual_into_wide_rows(
    device: torch.device, branch: torch.dtype, stream: torch.dtype, half: torch.dtype
) -> None:
    T, N, P = 5, 200, 16
    x = random(T, N, dtype=branch, device=device, seed=1)
    residual = random(T, N, dtype=stream, device=device, seed=2, scale=3.0)
    weight = (1 + random(N, dtype=torch.float32, device=device, seed=3, scale=0.2)).to(half)
    out = guarded(T, N + P, dtype=half, device=device, stride=N + P + 7)
    h_out = guarded(T, N, dtype=stream, device=device, stride=N + 3)
    rstd_out = guarded(T, dtype=torch.float32, device=device)
    y, h, rstd = rms_norm_forward(
        x, weight, EPS, residual=residual, out=out.view, h_out=h_out.view, rstd_out=rstd_out.view
    )
    for buffer in (out, h_out, rstd_out):
        buffer.check()
    assert torch.equal(h, (x + residual).to(stream))
    assert torch.equal(out.view[:, N:], torch.zeros_like(out.view[:, N:]))
    accuracy = Accuracy()
    accuracy.add("y", y, reference(h, weight, EPS).to(half), reference(h.double(), weight.double(), EPS))

    dy = random(T, N + P, dtype=half, device=device, seed=4)[:, :N]
    residual_grad = random(T, N, dtype=stream, device=device, seed=5)
    dx = guarded(T, N, dtype=stream, device=device, stride=N + 5)
    low = guarded(T, N, dtype=half, device=device)
    rms_norm_backward(dy, h, weight, rstd, residual_grad=residual_grad, out=dx.view, branch_out=low.view)
    dx.check()
    low.check()
    run = lambda h, w: reference(h, w, EPS)  # noqa: E731
    oracle = oracle_gradients(run, (h.double(), weight.double()), (dy.double(),))[1][0] + residual_grad.double()
    stock_dx = (oracle_gradients(run, (h, weight), (dy,))[1][0] + residual_grad).to(stream)
    accuracy.add("dx", dx.view, stock_dx, oracle)
    accuracy.add("branch", low.view, stock_dx.to(half), oracle)
    accuracy.check()


def test_in_place(device: torch.device) -> None:
    """h over the residual, dx over the gradient of the residual: what a layer's backward does to save memory."""
    x, weight, dy = inputs(4, 96, torch.bfloat16, device, 0)
    residual, residual_grad = x.flip(0).contiguous(), dy.flip(0).contiguous()
    y, h, rstd = rms_norm_forward(x, weight, EPS, residual=residual)
    y2, h2, _ = rms_norm_forward(x, weight, EPS, residual=residual, h_out=residual)
    assert h2 is residual
    assert torch.equal(h, h2)
    assert torch.equal(y, y2)
    dx = rms_norm_backward(dy, h, weight, rstd, residual_grad=residual_grad)
    buffer = residual_grad.clone()
    assert torch.equal(rms_norm_backward(dy, h, weight, rstd, residual_grad=buffer, out=buffer), dx)
    buffer = dy.clone()
    assert torch.equal(rms_norm_backward(buffer, h, weight, rstd, residual_grad=residual_grad, out=buffer), dx)
    buffer = h.clone()
    assert torch.equal(rms_norm_backward(dy, buffer, weight, rstd, residual_grad=residual_grad, out=buffer), dx)


@pytest.mark.parametrize(("T", "N"), [(150, 72), (9, 2100), (4, 8200)])
@pytest.mark.parametrize("unit_offset", [False, True])
def test_trained_weight_beside_everything_else(device: torch.device, unit_offset: bool, T: int, N: int) -> None:
    """More rows than programs; the input's gradient is what it is without the weight's, in place and in the branch."""
    x, weight, dy = inputs(T, N, torch.bfloat16, device, 0)
    h = x.float()
    residual_grad = random(T, N, dtype=torch.float32, device=device, seed=3)
    rstd = rms_norm_forward(h, weight, EPS, unit_offset=unit_offset).rstd
    options = {"unit_offset": unit_offset, "residual_grad": residual_grad}
    dx_want = rms_norm_backward(dy, h, weight, rstd, **options)
    want = reference_backward(dy.double(), h.double(), weight.double(), rstd.double(), unit_offset=unit_offset)[1]
    branch = guarded(T, N, dtype=torch.bfloat16, device=device, stride=N + 3)
    dweight = guarded(N, dtype=torch.float32, device=device)
    dx = rms_norm_backward(
        dy, h, weight, rstd, **options, out=residual_grad, branch_out=branch.view, dweight=dweight.view
    )
    for buffer in (branch, dweight):
        buffer.check()
    assert dx is residual_grad
    torch.testing.assert_close(dx, dx_want, rtol=1e-5, atol=1e-5)
    assert torch.equal(branch.view, dx.to(torch.bfloat16))
    torch.testing.assert_close(dweight.view, want.float(), rtol=1e-5, atol=1e-4)


def test_deterministic(device: torch.device) -> None:
    x, weight, dy = inputs(37, 520, torch.bfloat16, device, 0)

    def run() -> tuple[Tensor, ...]:
        y, _, rstd = rms_norm_forward(x, weight, EPS)
        dweight = torch.empty_like(weight)
        return y, rstd, rms_norm_backward(dy, x, weight, rstd, dweight=dweight), dweight

    assert_deterministic(run)


@pytest.mark.parametrize("unit_offset", [False, True])
def test_autograd(device: torch.device, unit_offset: bool) -> None:
    x, weight, dy = inputs(6, 72, torch.float32, device, 0)
    residual, dh = x.flip(0).contiguous(), dy.flip(0).contiguous()
    shape = (2, 3, 72)

    def expected(x: Tensor, residual: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        h = x + residual
        return reference(h, weight, EPS, unit_offset=unit_offset), h

    def ours(x: Tensor, residual: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        return add_rms_norm(x, residual, weight, EPS, unit_offset=unit_offset)

    args = (x.view(shape), residual.view(shape), weight)
    grads = (dy.view(shape), dh.view(shape))
    for got, want in zip(oracle_gradients(ours, args, grads), oracle_gradients(expected, args, grads)):
        for a, b in zip(got, want):
            torch.testing.assert_close(a, b, rtol=2e-5, atol=2e-5)
    got = oracle_gradients(lambda x, w: rms_norm(x, w, EPS, unit_offset=unit_offset), (args[0], weight), grads[:1])
    want = oracle_gradients(lambda x, w: reference(x, w, EPS, unit_offset=unit_offset), (args[0], weight), grads[:1])
    for a, b in zip(got[0] + got[1], want[0] + want[1]):
        torch.testing.assert_close(a, b, rtol=2e-5, atol=2e-5)


@interpreted
@settings(max_examples=15, deadline=None, derandomize=True)
@given(T=st.integers(0, 9), N=st.integers(1, 300), pad=st.integers(0, 40))
def test_any_shape(T: int, N: int, pad: int) -> None:
    """Kernels against the reference, on the CPU."""
    x, weight, dy = inputs(T, N, torch.float32, torch.device("cpu"), 0)
    results = []
    for enabled in (True, False):
        with kernels_on_cpu(enabled):
            out = torch.full((T, N + pad), float("nan"))
            _, _, rstd = rms_norm_forward(x, weight, EPS, out=out)
            dweight = torch.empty_like(weight)
            results.append((out, rstd, rms_norm_backward(dy, x, weight, rstd, dweight=dweight), dweight))
    for a, b in zip(*results):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=2e-5)


@interpreted
def test_supported_says_why() -> None:
    x, weight = torch.zeros(2, 8), torch.zeros(8)
    assert supported(x, weight) == "kernels need a GPU"
    with kernels_on_cpu():
        assert supported(x, weight) is None
        assert "float64" in str(supported(x.double(), weight))
        assert "not contiguous" in str(supported(torch.zeros(8, 2).t(), weight))
        assert "registers" in str(supported(torch.zeros(1, 40000), torch.zeros(40000)))


def test_rows_fill_programs() -> None:
    assert RowLaunch.of(4096) == RowLaunch(4096, 1, 8)
    assert RowLaunch.of(3584) == RowLaunch(4096, 1, 8)
    assert RowLaunch.of(64) == RowLaunch(64, 32, 4)
    assert RowLaunch.of(16384) == RowLaunch(16384, 1, 32)


@pytest.mark.gpu
def test_more_than_2_31_elements() -> None:
    T, N = 2**19 + 3, 4096
    device = torch.device("cuda")
    x = torch.randn(T, N, dtype=torch.bfloat16, device=device)
    weight = torch.randn(N, dtype=torch.bfloat16, device=device)
    y, _, rstd = rms_norm_forward(x, weight, EPS)
    tail = slice(T - 5, T)
    expected = rms_norm_forward(x[tail].clone(), weight, EPS)
    assert torch.equal(y[tail], expected.y)
    dx = rms_norm_backward(y, x, weight, rstd)
    assert torch.equal(dx[tail], rms_norm_backward(y[tail].clone(), x[tail].clone(), weight, rstd[tail].clone()))


@pytest.mark.gpu
def test_in_a_cuda_graph() -> None:
    x, weight, _ = inputs(64, 512, torch.bfloat16, torch.device("cuda"), 0)
    expected = rms_norm_forward(x, weight, EPS).y
    out = torch.full_like(x, float("nan"))
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        rms_norm_forward(x, weight, EPS, out=out)
    out.fill_(float("nan"))
    graph.replay()
    assert torch.equal(out, expected)
