"""Launches of cross_entropy, with all that the head's ops make of it, to compile ahead of time."""

from __future__ import annotations

from collections.abc import Callable
from itertools import product

import torch

from pyralis.ops._loss import LossSettings
from pyralis.ops.cross_entropy import cross_entropy_backward, cross_entropy_forward
from pyralis.ops.linear_cross_entropy import linear_cross_entropy_backward, linear_cross_entropy_forward
from pyralis.ops.token_logprobs import token_logprobs_backward, token_logprobs_forward
from tests.ops.aot import Case, meta

T, H = 4096, 64
SETTINGS = (LossSettings(), LossSettings(30.0, 0.0625, 0.1, 1e-4), LossSettings(label_smoothing=0.1))


def _rows(vocab: int, dtype: torch.dtype, settings: LossSettings) -> Callable[[], None]:
    def call() -> None:
        logits, labels = meta(T, vocab, dtype=dtype), meta(T, dtype=torch.int64)
        rows = cross_entropy_forward(logits, labels, settings)
        cross_entropy_backward(logits, labels, rows, meta(dtype=torch.float32), settings, out=logits)

    return call


def _head(vocab: int, dtype: torch.dtype, settings: LossSettings) -> Callable[[], None]:
    def call() -> None:
        hidden, weight, labels = meta(T, H, dtype=dtype), meta(vocab, H, dtype=dtype), meta(T, dtype=torch.int64)
        for supervised_rows in (None, 1000):
            result = linear_cross_entropy_forward(
                hidden, weight, labels, settings=settings, supervised_rows=supervised_rows, needs=(True, True, False)
            )
            linear_cross_entropy_backward(result, meta(dtype=torch.float32), dtype)
            _, stats = token_logprobs_forward(
                hidden, weight, labels, settings=settings, supervised_rows=supervised_rows
            )
            token_logprobs_backward(
                meta(T, dtype=torch.float32), hidden, weight, labels, stats, settings=settings,
                supervised_rows=supervised_rows, needs=(True, True, False),
            )  # fmt: skip

    return call


def cases() -> list[Case]:
    dtypes = (torch.bfloat16, torch.float16, torch.float32)
    found = []
    for vocab, dtype, settings in product((128256, 32003, 256000, 1000), dtypes, SETTINGS):
        found.append(Case(f"V={vocab} {dtype} {settings}", _rows(vocab, dtype, settings)))
        found.append(Case(f"head of V={vocab} {dtype} {settings}", _head(vocab, dtype, settings)))
    return found
