from __future__ import annotations

from typing import get_args

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers.activations import ACT2FN

from pyralis.ops._triton import kernels_on_cpu
from pyralis.ops.glu import (
    Activation,
    glu,
    glu_backward,
    glu_forward,
    reference,
    reference_backward,
    split_gate_up,
    supported,
)
from tests.ops.harness import Accuracy, assert_deterministic, guarded, interpreted, oracle_gradients, random

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
ACTIVATIONS = get_args(Activation)
STOCK = {"silu": "silu", "gelu_tanh": "gelu_pytorch_tanh", "gelu": "gelu"}


def inputs(T: int, size: int, dtype: torch.dtype, device: torch.device, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """(gate_up, dh); gate has values far out on both sides."""
    gate_up = random(T, 2 * size, dtype=dtype, device=device, seed=seed, scale=3.0)
    return gate_up, random(T, size, dtype=dtype, device=device, seed=seed + 50)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_reference_is_stock(activation: Activation, dtype: torch.dtype) -> None:
    gate, up = split_gate_up(inputs(3, 40, dtype, torch.device("cpu"), 0)[0])
    assert torch.equal(reference(gate, up, activation), ACT2FN[STOCK[activation]](gate) * up)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_reference_backward_is_the_derivative(activation: Activation) -> None:
    gate_up, dh = inputs(3, 40, torch.float64, torch.device("cpu"), 0)
    gate, up = split_gate_up(gate_up)
    _, grads = oracle_gradients(lambda g, u: reference(g, u, activation), (gate, up), (dh,))
    for got, want in zip(reference_backward(dh, gate, up, activation), grads):
        torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize(("T", "size"), [(3, 64), (5, 200), (2, 1100)])
def test_forward_and_backward(
    device: torch.device, T: int, size: int, activation: Activation, dtype: torch.dtype
) -> None:
    accuracy = Accuracy()
    for seed in range(3):
        gate_up, dh = inputs(T, size, dtype, device, seed)
        gate, up = split_gate_up(gate_up)

        def run(g: Tensor, u: Tensor) -> Tensor:
            return reference(g, u, activation)

        oracle = oracle_gradients(run, (gate.double(), up.double()), (dh.double(),))
        stock = oracle_gradients(run, (gate, up), (dh,))
        out = guarded(T, size + 16, dtype=dtype, device=device, stride=size + 19)
        h = glu_forward(gate, up, activation, out=out.view)
        out.check()
        assert torch.equal(out.view[:, size:], torch.zeros_like(out.view[:, size:]))
        buffers = [guarded(T, size, dtype=dtype, device=device, stride=size + i) for i in (5, 0, 3)]
        again, dgate, dup = glu_backward(
            dh, gate, up, activation, dgate=buffers[0].view, dup=buffers[1].view, h_out=buffers[2].view
        )
        for buffer in buffers:
            buffer.check()
        assert again is not None
        assert torch.equal(h, again)
        accuracy.add("h", h, stock[0][0], oracle[0][0])
        accuracy.add("dgate", dgate, stock[1][0], oracle[1][0])
        accuracy.add("dup", dup, stock[1][1], oracle[1][1])
    accuracy.check()


def test_in_place(device: torch.device) -> None:
    """Gradients over gate_up and h over dh, as a layer's backward does."""
    gate_up, dh = inputs(4, 96, torch.bfloat16, device, 0)
    h, dgate, dup = glu_backward(dh, *split_gate_up(gate_up))
    gate, up = split_gate_up(gate_up)
    glu_backward(dh, gate, up, dgate=gate, dup=up, h_out=dh)
    assert h is not None
    assert torch.equal(dh, h)
    assert torch.equal(gate_up, torch.cat([dgate, dup], -1))


@pytest.mark.filterwarnings("ignore:overflow encountered in exp")  # NumPy's, in the interpreter; 1 / inf is meant
def test_large_gates(device: torch.device) -> None:
    """Far out the activations are 0 or the identity, without NaN."""
    gate = torch.tensor([[-1e4, -88.0, -30.0, 0.0, 30.0, 88.0, 1e4]], device=device)
    ones = torch.ones_like(gate)
    for activation in ACTIVATIONS:
        h = glu_forward(gate, ones, activation)
        _, dgate, _ = glu_backward(ones, gate, ones, activation)
        torch.testing.assert_close(h, gate.clamp(min=0), rtol=0, atol=1e-6)
        expected = torch.tensor([[0, 0, 0, 0.5, 1, 1, 1]], device=device)
        torch.testing.assert_close(dgate, expected, rtol=0, atol=1e-6)


def test_deterministic(device: torch.device) -> None:
    gate_up, dh = inputs(7, 300, torch.bfloat16, device, 0)
    gate, up = split_gate_up(gate_up)
    assert_deterministic(lambda: (glu_forward(gate, up), *glu_backward(dh, gate, up)[1:]))


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_autograd(device: torch.device, activation: Activation) -> None:
    gate_up, dh = inputs(6, 36, torch.float32, device, 0)
    args = tuple(t.reshape(2, 3, 36) for t in split_gate_up(gate_up))
    got = oracle_gradients(lambda g, u: glu(g, u, activation), args, (dh.view(2, 3, 36),))
    want = oracle_gradients(lambda g, u: reference(g, u, activation), args, (dh.view(2, 3, 36),))
    for a, b in zip(got[0] + got[1], want[0] + want[1]):
        torch.testing.assert_close(a, b, rtol=2e-5, atol=2e-5)


@interpreted
@settings(max_examples=15, deadline=None, derandomize=True)
@given(T=st.integers(0, 6), size=st.integers(1, 200), pad=st.integers(0, 40), activation=st.sampled_from(ACTIVATIONS))
def test_any_shape(T: int, size: int, pad: int, activation: Activation) -> None:
    gate_up, dh = inputs(T, size, torch.float32, torch.device("cpu"), 0)
    gate, up = split_gate_up(gate_up)
    results = []
    for enabled in (True, False):
        with kernels_on_cpu(enabled):
            out = torch.full((T, size + pad), float("nan"))
            glu_forward(gate, up, activation, out=out)
            results.append((out, *glu_backward(dh, gate, up, activation)))
    for a, b in zip(*results):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


@interpreted
def test_supported_says_why() -> None:
    gate = torch.zeros(2, 8)
    assert supported(gate, gate) == "kernels need a GPU"
    with kernels_on_cpu():
        assert supported(gate, gate) is None
        assert "float64" in str(supported(gate.double(), gate.double()))


@pytest.mark.gpu
def test_more_than_2_31_elements() -> None:
    T, size = 2**17 + 3, 8192
    gate_up = torch.randn(T, 2 * size, dtype=torch.bfloat16, device="cuda")
    gate, up = split_gate_up(gate_up)
    h = glu_forward(gate, up)
    tail = gate_up[-5:].clone()
    assert torch.equal(h[-5:], glu_forward(*split_gate_up(tail)))
    glu_backward(h, gate, up, dgate=gate, dup=up, need_h=False)
    expected = glu_backward(h[-5:], *split_gate_up(tail))
    assert torch.equal(gate_up[-5:], torch.cat([expected.dgate, expected.dup], -1))
