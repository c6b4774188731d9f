from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from pyralis.errors import ConfigError
from pyralis.ops._loss import PLAIN, LossSettings, RowLosses
from pyralis.ops._triton import at_least_float32, kernels_on_cpu
from pyralis.ops.cross_entropy import (
    IGNORE_INDEX,
    CrossEntropyLaunch,
    cross_entropy,
    cross_entropy_backward,
    cross_entropy_forward,
    cross_entropy_in_place,
    reference,
    reference_gradient,
    supported,
)
from tests.ops.harness import Accuracy, assert_deterministic, guarded, interpreted, oracle_gradients, random

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
ALL_AT_ONCE = LossSettings(softcap=5.0, logit_scale=0.7, label_smoothing=0.1, z_loss=1e-2)
SETTINGS = (
    PLAIN,
    LossSettings(softcap=5.0),
    LossSettings(logit_scale=0.0625),
    LossSettings(label_smoothing=0.1),
    LossSettings(z_loss=1e-2),
    ALL_AT_ONCE,
)
CASES = [(24, 200, options) for options in SETTINGS] + [
    (n, V, options) for n, V in ((2, 32003), (1, 16400), (5, 7)) for options in (PLAIN, ALL_AT_ONCE)
]


def inputs(n: int, V: int, dtype: torch.dtype, device: torch.device, seed: int) -> tuple[Tensor, Tensor]:
    """(logits [n, V], labels [n], of which the second is ignored)"""
    labels = torch.randint(V, (n,), generator=torch.Generator().manual_seed(seed))
    labels[1:2] = IGNORE_INDEX
    return random(n, V, dtype=dtype, device=device, seed=seed, scale=3.0), labels.to(device)


def stock_logits(logits: Tensor, options: LossSettings) -> Tensor:
    """As transformers models do it: scale and softcap in the logits' dtype, then float32."""
    logits = logits * options.logit_scale
    if options.softcap is not None:
        logits = torch.tanh(logits / options.softcap) * options.softcap
    return logits.to(at_least_float32(logits.dtype))


def stock(logits: Tensor, labels: Tensor, options: LossSettings) -> Tensor:
    z = stock_logits(logits, options)
    loss = F.cross_entropy(z, labels, reduction="none", label_smoothing=options.label_smoothing)
    return loss + options.z_loss * z.logsumexp(-1).square() * (labels != IGNORE_INDEX)


@pytest.mark.parametrize("options", SETTINGS)
def test_reference_is_stock_and_its_gradient_the_derivative(options: LossSettings) -> None:
    logits, labels = inputs(4, 33, torch.float64, torch.device("cpu"), 0)
    scale = random(4, dtype=torch.float64, device=torch.device("cpu"), seed=1)
    loss, (expected,) = oracle_gradients(lambda x: stock(x, labels, options), (logits,), (scale,))
    torch.testing.assert_close(reference(logits, labels, options), loss[0], rtol=1e-12, atol=1e-12)
    rows = cross_entropy_forward(logits, labels, options)
    torch.testing.assert_close(rows.loss, loss[0], rtol=1e-12, atol=1e-12)
    got = reference_gradient(logits, labels, rows, scale, options)
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)
    (derivative,) = oracle_gradients(lambda x: reference(x, labels, options), (logits,), (scale,))[1]
    torch.testing.assert_close(derivative, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("n", "V", "options"), CASES)
def test_forward_and_backward(device: torch.device, n: int, V: int, options: LossSettings, dtype: torch.dtype) -> None:
    accuracy = Accuracy()
    for seed in range(2):
        logits, labels = inputs(n, V, dtype, device, seed)
        scale = (1 + torch.arange(n, device=device) / 4).float()
        (oracle_loss,), (oracle,) = oracle_gradients(
            lambda x, y=labels: reference(x, y, options), (logits.double(),), (scale,)
        )
        (stock_loss,), (stock_grad,) = oracle_gradients(lambda x, y=labels: stock(x, y, options), (logits,), (scale,))
        rows = cross_entropy_forward(logits, labels, options)
        dx = cross_entropy_backward(logits, labels, rows, scale, options)
        accuracy.add("dx", dx, stock_grad, oracle)
        if n >= 24:  # a root mean square of fewer says little
            accuracy.add("loss", rows.loss, stock_loss, oracle_loss)
        torch.testing.assert_close(rows.loss, oracle_loss.float(), rtol=2e-7, atol=1e-6)

        losses = torch.full((n,), torch.nan, device=device)
        over = logits.clone()
        cross_entropy_in_place(over, labels, scale, options, loss_out=losses)
        assert torch.equal(losses, rows.loss)
        assert torch.equal(over, dx)
    accuracy.check()


@pytest.mark.parametrize("V", [96, 1001])
def test_strided_rows_stay_within_bounds(device: torch.device, V: int) -> None:
    logits, labels = inputs(3, V, torch.bfloat16, device, 0)
    scale = torch.tensor(0.5, device=device)
    rows = RowLosses(*(guarded(3, dtype=torch.float32, device=device) for _ in range(3)))  # type: ignore[arg-type]
    views = RowLosses(*(r.view for r in rows))  # type: ignore[attr-defined]
    wide = guarded(3, V, dtype=torch.bfloat16, device=device, stride=V + 7)
    wide.view.copy_(logits)
    cross_entropy_forward(wide.view, labels, ALL_AT_ONCE, out=views)
    dx = guarded(3, V, dtype=torch.float32, device=device, stride=V + 3)
    cross_entropy_backward(wide.view, labels, views, scale, ALL_AT_ONCE, out=dx.view)
    cross_entropy_in_place(wide.view, labels, scale, ALL_AT_ONCE, loss_out=torch.empty(3, device=device))
    for buffer in (*rows, wide, dx):
        buffer.check()  # type: ignore[union-attr]
    assert torch.equal(wide.view, dx.view.bfloat16())


def test_odd_labels_and_logits(device: torch.device) -> None:
    logits, labels = inputs(6, 70, torch.float32, device, 0)
    labels[2], labels[3] = 70, -1
    logits[4, :-1][labels[4] != torch.arange(69, device=device)] = -math.inf  # a row of hidden vocabulary but two
    logits[1] = math.nan  # ignored
    rows = cross_entropy_forward(logits, labels)
    dx = cross_entropy_backward(logits, labels, rows, torch.ones((), device=device))
    assert rows.loss.isnan().tolist() == [False, False, True, True, False, False]
    assert dx.isnan().any(1).tolist() == [False, False, True, True, False, False]
    assert rows.loss[1] == 0
    assert not dx[1].any()
    expected = F.cross_entropy(logits[[0, 4, 5]], labels[[0, 4, 5]], reduction="none")
    torch.testing.assert_close(rows.loss[[0, 4, 5]], expected)


def test_confident_rows_keep_their_digits(device: torch.device) -> None:
    """Where the label wins by far the loss is small, though the logits are large."""
    logits = torch.tensor([[1000.0, 990.0, 985.0]], device=device)
    labels = torch.zeros(1, dtype=torch.int64, device=device)
    expected = F.cross_entropy(logits.double(), labels).float()
    torch.testing.assert_close(cross_entropy_forward(logits, labels).loss[0], expected, rtol=1e-2, atol=0)


@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize("num_items", [None, 7, torch.tensor(7)])
def test_autograd(device: torch.device, num_items: Tensor | int | None, in_place: bool) -> None:
    logits, labels = inputs(6, 40, torch.float32, device, 0)
    items = 5 if num_items is None else 7

    def ours(x: Tensor) -> Tensor:
        x = x * 1.0  # in_place may not overwrite a leaf
        return cross_entropy(
            x.view(2, 3, 40), labels.view(2, 3), num_items=num_items, softcap=5.0, logit_scale=0.7,
            label_smoothing=0.1, z_loss=1e-2, in_place=in_place,
        )  # fmt: skip

    grad = torch.tensor(3.0, device=device)
    got = oracle_gradients(ours, (logits,), (grad,))
    want = oracle_gradients(lambda x: stock(x, labels, ALL_AT_ONCE).sum() / items, (logits,), (grad,))
    for a, b in zip(got[0] + got[1], want[0] + want[1]):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_nothing_to_learn_is_zero(device: torch.device) -> None:
    logits = random(3, 20, dtype=torch.float32, device=device, seed=0).requires_grad_()
    loss = cross_entropy(logits, torch.full((3,), IGNORE_INDEX, device=device))
    loss.backward()
    assert loss == 0
    assert logits.grad is not None
    assert not logits.grad.any()


def test_deterministic(device: torch.device) -> None:
    logits, labels = inputs(5, 1003, torch.bfloat16, device, 0)

    def run() -> tuple[Tensor, Tensor]:
        over, losses = logits.clone(), torch.empty(5, device=device)
        cross_entropy_in_place(over, labels, torch.ones((), device=device), ALL_AT_ONCE, loss_out=losses)
        return over, losses

    assert_deterministic(run)


@interpreted
@settings(max_examples=15, deadline=None, derandomize=True)
@given(n=st.integers(0, 4), V=st.integers(2, 700), pad=st.integers(0, 9), options=st.sampled_from(SETTINGS))
def test_any_shape(n: int, V: int, pad: int, options: LossSettings) -> None:
    """Kernels against the reference, on the CPU."""
    logits, labels = inputs(n, V + pad, torch.float32, torch.device("cpu"), 0)
    labels.clamp_(max=V - 1)
    results = []
    for enabled in (True, False):
        with kernels_on_cpu(enabled):
            over, losses = logits.clone(), torch.full((n,), torch.nan)
            cross_entropy_in_place(over[:, :V], labels, torch.ones(()), options, loss_out=losses)
            results.append((over, losses))
    for a, b in zip(*results):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("wrong", [{"softcap": 0.0}, {"label_smoothing": 1.0}, {"z_loss": -1.0}])
def test_settings_out_of_range(wrong: dict[str, float]) -> None:
    (name,) = wrong
    with pytest.raises(ConfigError, match=name):
        LossSettings(**wrong)


@interpreted
def test_supported_says_why() -> None:
    logits = torch.zeros(2, 8)
    assert supported(logits) == "kernels need a GPU"
    with kernels_on_cpu():
        assert supported(logits) is None
        assert "float64" in str(supported(logits.double()))


def test_launch_rule() -> None:
    assert CrossEntropyLaunch.of(128256, 2) == CrossEntropyLaunch(8192, 8, 16)
    assert CrossEntropyLaunch.of(128256, 4) == CrossEntropyLaunch(4096, 4, 16)
    assert CrossEntropyLaunch.of(32003, 4) == CrossEntropyLaunch(2048, 4, 8)
    assert CrossEntropyLaunch.of(1000, 2) == CrossEntropyLaunch(1024, 8, 4)
    assert CrossEntropyLaunch.of(7, 2) == CrossEntropyLaunch(32, 8, 1)


@pytest.mark.gpu
def test_more_than_2_31_elements() -> None:
    n, V, device = 2**14 + 3, 2**17 + 1, torch.device("cuda")
    logits = torch.randn(n, V, dtype=torch.bfloat16, device=device)
    labels = torch.randint(V, (n,), device=device)
    tail = slice(n - 3, n)
    last, losses, last_losses = logits[tail].clone(), torch.empty(n, device=device), torch.empty(3, device=device)
    one = torch.ones((), device=device)
    cross_entropy_in_place(last, labels[tail], one, loss_out=last_losses)
    cross_entropy_in_place(logits, labels, one, loss_out=losses)
    assert torch.equal(losses[tail], last_losses)
    assert torch.equal(logits[tail], last)


@pytest.mark.gpu
@pytest.mark.parametrize("V", [128256, 256000, 151936])
def test_large_vocabularies(V: int) -> None:
    device, accuracy = torch.device("cuda"), Accuracy()
    logits, labels = inputs(64, V, torch.bfloat16, device, 0)
    one = torch.ones(64, device=device)
    oracle = oracle_gradients(lambda x: reference(x, labels, ALL_AT_ONCE), (logits.double(),), (one,))
    expected = oracle_gradients(lambda x: stock(x, labels, ALL_AT_ONCE), (logits,), (one,))
    losses = torch.empty(64, device=device)
    cross_entropy_in_place(logits, labels, one, ALL_AT_ONCE, loss_out=losses)
    accuracy.add("loss", losses, expected[0][0], oracle[0][0])
    accuracy.add("dx", logits, expected[1][0], oracle[1][0])
    accuracy.check()
