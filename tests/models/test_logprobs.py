from __future__ import annotations

import pytest
import torch

from pyralis.models.families import FAMILIES
from pyralis.models.logprobs import causal_lm_logprobs
from pyralis.models.surgery import accelerate
from tests.tiny import VOCAB_SIZE, build_tiny_model

EVERY = tuple(family.name for family in FAMILIES)
ROWS = torch.tensor([3, 7, 3, 0, 12])  # of two rows of 8; the fourth position predicts two tokens
TARGETS = torch.tensor([5, 11, 300, 42, 17])


@pytest.mark.parametrize("family", ["llama", "gemma2", "granite", "gpt2"])
def test_logprobs_statistics_and_gradients_are_those_of_stock_logits(family: str) -> None:
    ids = torch.randint(VOCAB_SIZE, (2, 8), generator=torch.Generator().manual_seed(1))
    stock, fast = build_tiny_model(family), build_tiny_model(family)
    assert bool(accelerate(fast, families=EVERY).fast_layers) == (family != "gpt2")
    weights = torch.tensor([1.0, -2.0, 0.5, 3.0, -1.0])

    log_p = stock(ids).logits.flatten(0, 1)[ROWS].log_softmax(-1)
    want = log_p.gather(1, TARGETS[:, None])[:, 0]
    (want * weights).sum().backward()
    got = causal_lm_logprobs(fast, {"input_ids": ids}, ROWS, TARGETS, with_statistics=True)
    assert got.statistics is not None
    (got.logprobs * weights).sum().backward()

    torch.testing.assert_close(got.logprobs, want, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(got.statistics.entropy, -(log_p.exp() * log_p).sum(-1), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(
        got.statistics.mean_logit, stock(ids).logits.flatten(0, 1)[ROWS].mean(-1), rtol=1e-5, atol=1e-5
    )
    assert torch.equal(got.statistics.is_top1, log_p.argmax(-1) == TARGETS)
    for (name, mine), (_, its) in zip(fast.named_parameters(), stock.named_parameters()):
        assert mine.grad is not None, name
        assert its.grad is not None, name
        assert (mine.grad - its.grad).norm() <= 1e-5 * its.grad.norm(), name


def test_rows_and_targets_go_together() -> None:
    with pytest.raises(ValueError, match=r"rows \[5\] and targets \[4\]"):
        causal_lm_logprobs(build_tiny_model(), {}, ROWS, TARGETS[:4])
