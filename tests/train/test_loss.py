"""The supervised loss against a float64 oracle written out by hand."""

from __future__ import annotations

import pytest
import torch

from pyralis.train.loss import IGNORE_INDEX, supervised_loss_sum


def oracle(logits: torch.Tensor, labels: torch.Tensor, smoothing: float = 0.0) -> torch.Tensor:
    """Token by token in float64: -(1 - e) log p[y] - e / V * sum log p."""
    total = torch.zeros((), dtype=torch.float64)
    for b in range(labels.shape[0]):
        for t in range(labels.shape[1] - 1):
            y = int(labels[b, t + 1])
            if y == IGNORE_INDEX:
                continue
            log_p = logits[b, t].double() - logits[b, t].double().logsumexp(0)
            total = total - (1 - smoothing) * log_p[y] - smoothing * log_p.mean()
    return total


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_loss_and_gradient_against_float64(dtype: torch.dtype, smoothing: float) -> None:
    generator = torch.Generator().manual_seed(1)
    logits = (torch.randn(3, 7, 19, generator=generator) * 3).to(dtype).requires_grad_()
    labels = torch.randint(0, 19, (3, 7), generator=generator)
    labels[torch.rand(3, 7, generator=generator) < 0.4] = IGNORE_INDEX
    labels[:, 0] = IGNORE_INDEX
    loss, count = supervised_loss_sum(logits, labels, label_smoothing=smoothing)
    assert loss.dtype == torch.float32
    assert int(count) == int((labels[:, 1:] != IGNORE_INDEX).sum())
    exact = logits.detach().double().requires_grad_()
    expected = oracle(exact, labels, smoothing)
    torch.testing.assert_close(loss.double(), expected, rtol=2e-6, atol=0)
    loss.backward()
    expected.backward()
    bound = {torch.float32: 1e-6, torch.bfloat16: 4e-3, torch.float16: 5e-4}[dtype]  # the rounding of the gradient
    assert (logits.grad.double() - exact.grad).abs().max() <= bound


def test_no_supervised_token_gives_zero_with_zero_gradient() -> None:
    logits = torch.randn(2, 4, 5, requires_grad=True)
    loss, count = supervised_loss_sum(logits, torch.full((2, 4), IGNORE_INDEX))
    loss.backward()
    assert loss.item() == 0.0
    assert int(count) == 0
    assert torch.equal(logits.grad, torch.zeros_like(logits))
