from __future__ import annotations

import pytest
import torch

from pyralis.ops import head_statistics as module
from pyralis.ops._loss import PLAIN, LossSettings
from pyralis.ops.head_statistics import HeadStatistics, head_statistics, reference
from pyralis.ops.token_logprobs import token_logprobs
from tests.ops.harness import random

CPU = torch.device("cpu")
CAPPED = LossSettings(softcap=5.0, logit_scale=0.7)


@pytest.mark.parametrize("settings", [PLAIN, CAPPED])
@pytest.mark.parametrize("part_bytes", [1, 3 * 4 * 203, 1 << 20])
def test_parts_of_any_size_give_the_reference_in_float64(
    settings: LossSettings, part_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "PART_BYTES", part_bytes)
    logits = random(11, 208, dtype=torch.float32, device=CPU, seed=0, scale=4.0)[:, :203]  # rows of a wider buffer
    labels = torch.where(torch.arange(11) % 2 == 0, logits.argmax(-1), 7)
    got, want = head_statistics(logits, labels, settings), reference(logits.double(), labels, settings)
    torch.testing.assert_close(got.entropy.double(), want.entropy, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(got.mean_logit.double(), want.mean_logit, rtol=1e-5, atol=1e-6)
    assert got.is_top1.tolist() == want.is_top1.tolist() == [i % 2 == 0 for i in range(11)]


def test_logprobs_fill_them_in_chunk_by_chunk_and_are_themselves_unchanged() -> None:
    hidden, weight = (
        random(n, 16, dtype=torch.float32, device=CPU, seed=s, scale=s + 1.0) for n, s in ((11, 0), (37, 1))
    )
    labels = torch.arange(11)
    statistics = HeadStatistics.empty(11, CPU)
    options = {"softcap": 5.0, "logit_scale": 0.7, "chunk_bytes": 64 * 4 * 3}
    y = token_logprobs(hidden, weight, labels, statistics=statistics, **options)  # type: ignore[arg-type]
    assert torch.equal(y, token_logprobs(hidden, weight, labels, **options))  # type: ignore[arg-type]
    want = reference(hidden.double() @ weight.double().t(), labels, CAPPED)
    torch.testing.assert_close(statistics.entropy.double(), want.entropy, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(statistics.mean_logit.double(), want.mean_logit, rtol=1e-5, atol=1e-5)
    assert torch.equal(statistics.is_top1, want.is_top1)
    with pytest.raises(ValueError, match="supervised_rows"):
        token_logprobs(hidden, weight, labels, statistics=statistics, supervised_rows=5)
