from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from pyralis.ops._loss import IGNORE_INDEX, LossSettings
from pyralis.ops._triton import at_least_float32
from pyralis.ops.token_logprobs import reference, token_logprobs
from tests.ops.harness import Accuracy, assert_deterministic, oracle_gradients, random
from tests.ops.test_linear_cross_entropy import CPU, DTYPES, inputs

CAPPED = LossSettings(softcap=5.0, logit_scale=0.7)


def stock(labels: Tensor, options: LossSettings) -> Callable[..., Tensor]:
    """As TRL's DPO does it: all logits, then log-softmax in float32."""

    def run(hidden: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        logits = torch.nn.functional.linear(hidden, weight, bias) * options.logit_scale
        if options.softcap is not None:
            logits = torch.tanh(logits / options.softcap) * options.softcap
        log_p = logits.to(at_least_float32(logits.dtype)).log_softmax(-1)
        chosen = log_p.gather(-1, labels.clamp(min=0)[..., None]).squeeze(-1)
        return chosen.masked_fill(labels == IGNORE_INDEX, 0.0)

    return run


def ours(labels: Tensor, options: LossSettings, **arguments: int | None) -> Callable[..., Tensor]:
    def run(hidden: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        return token_logprobs(
            hidden, weight, labels, bias=bias, softcap=options.softcap, logit_scale=options.logit_scale, **arguments
        )

    return run


def test_reference_is_stock_and_the_chunked_cpu_path_equals_it() -> None:
    hidden, weight, bias, labels = inputs(11, 16, 37, torch.float64, CPU, 0)
    dy = random(11, dtype=torch.float64, device=CPU, seed=3)
    want = oracle_gradients(stock(labels, CAPPED), (hidden, weight, bias), (dy,))
    for function in (
        lambda h, w, b: reference(h, w, labels, b, CAPPED),
        ours(labels, CAPPED, chunk_bytes=64 * 8 * 2),
        ours(labels, CAPPED),
    ):
        got = oracle_gradients(function, (hidden, weight, bias), (dy,))
        for a, b in zip(got[0] + got[1], want[0] + want[1]):
            torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("T", "H", "V", "step"), [(29, 40, 203, 5), (3, 16, 3203, 3)])
def test_logprobs_and_gradients(device: torch.device, T: int, H: int, V: int, step: int, dtype: torch.dtype) -> None:
    accuracy = Accuracy()
    for seed in range(3):
        hidden, weight, bias, labels = inputs(T, H, V, dtype, device, seed, ignored=0.3 if T > 3 else 0.0)
        given = (hidden, weight, bias)
        dy = random(T, dtype=torch.float32, device=device, seed=seed, scale=100.0)
        chunk_bytes = step * (V + 63) // 64 * 64 * dtype.itemsize
        got = oracle_gradients(ours(labels, CAPPED, chunk_bytes=chunk_bytes), given, (dy,))
        usual = oracle_gradients(stock(labels, CAPPED), given, (dy,))
        oracle = oracle_gradients(stock(labels, CAPPED), tuple(t.double() for t in given), (dy,))
        if T > 3:
            accuracy.add("y", got[0][0], usual[0][0], oracle[0][0])
        for name, *grads in zip(("dhidden", "dweight", "dbias"), got[1], usual[1], oracle[1]):
            accuracy.add(name, *grads)
    accuracy.check()


@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_left_out_change_nothing(device: torch.device, dtype: torch.dtype) -> None:
    hidden, weight, bias, labels = inputs(150, 24, 70, dtype, device, 0, ignored=0.8)
    count = int((labels != IGNORE_INDEX).sum())
    dy = random(150, dtype=torch.float32, device=device, seed=3)
    dy[labels == IGNORE_INDEX] = torch.nan  # nobody looks at it
    given, dy, y = (hidden.view(3, 50, 24), weight, bias), dy.view(3, 50), labels.view(3, 50)
    all_rows, fewer = (
        oracle_gradients(ours(y, CAPPED, supervised_rows=rows, chunk_bytes=8192), given, (dy,))
        for rows in (None, count)
    )
    assert torch.equal(all_rows[0][0], fewer[0][0])
    torch.testing.assert_close(fewer[1][0], all_rows[1][0])
    for a, b in zip(fewer[1][1:], all_rows[1][1:]):
        torch.testing.assert_close(a, b, rtol=0, atol=4 * torch.finfo(dtype).eps * float(b.abs().max()))


def test_too_few_rows_told_is_nan(device: torch.device) -> None:
    hidden, weight, _, labels = inputs(150, 8, 20, torch.float32, device, 0, ignored=0.0)
    y, (dhidden, _) = oracle_gradients(
        ours(labels, CAPPED, supervised_rows=100), (hidden, weight), (torch.ones(150, device=device),)
    )
    assert y[0].isnan().all()
    assert dhidden[:128].isnan().all()


@pytest.mark.filterwarnings("ignore:overflow encountered in cast")  # the interpreter's numpy
@pytest.mark.parametrize("exponent", [-30, -10, 12, 30])
def test_float16_takes_any_size_of_upstream_gradient(device: torch.device, exponent: int) -> None:
    """What is too small or too large for float16 is so only at the end."""
    hidden, weight, _, labels = inputs(12, 16, 90, torch.float16, device, 0)
    dy, size = random(12, dtype=torch.float32, device=device, seed=1), 2.0**exponent
    unit = oracle_gradients(ours(labels, CAPPED), (hidden, weight), (dy,))[1]
    got = oracle_gradients(ours(labels, CAPPED), (hidden, weight), (dy * size,))[1]
    for a, one in zip(got, unit):
        torch.testing.assert_close(a, (one.float() * size).half(), rtol=0, atol=2.0**-24 * max(size, 1.0))


def test_nothing_asked_is_zero(device: torch.device) -> None:
    hidden, weight, _, labels = inputs(5, 8, 20, torch.float16, device, 0, ignored=1.1)
    for rows in (None, 0):
        y, grads = oracle_gradients(
            ours(labels, CAPPED, supervised_rows=rows), (hidden, weight), (torch.ones(5, device=device),)
        )
        for t in (*y, *grads):
            assert torch.equal(t, torch.zeros_like(t))


def test_frozen_head(device: torch.device) -> None:
    hidden, weight, _, labels = inputs(9, 16, 40, torch.bfloat16, device, 0)
    dy = torch.ones(9, device=device)
    expected = oracle_gradients(ours(labels, CAPPED), (hidden, weight), (dy,))[1][0]
    leaf = hidden.clone().requires_grad_()
    ours(labels, CAPPED)(leaf, weight).backward(dy)
    assert torch.equal(leaf.grad, expected)  # type: ignore[arg-type]


def test_deterministic(device: torch.device) -> None:
    hidden, weight, bias, labels = inputs(150, 24, 100, torch.bfloat16, device, 0, ignored=0.6)
    dy = random(150, dtype=torch.float32, device=device, seed=3)

    def run() -> tuple[Tensor, ...]:
        y, grads = oracle_gradients(
            ours(labels, CAPPED, supervised_rows=100, chunk_bytes=1 << 13), (hidden, weight, bias), (dy,)
        )
        return (*y, *grads)

    assert_deterministic(run)
