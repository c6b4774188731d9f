from __future__ import annotations

import pytest
import torch
from torch import Tensor

from pyralis.ops.dropout_mask import LEVELS, advance, masked, new_rng, reference
from pyralis.ops.lora_group import LoraProjection
from tests.ops.harness import guarded

CPU = torch.device("cpu")
STREAM = 11


def philox(counter: tuple[int, ...], key: tuple[int, int]) -> tuple[int, ...]:
    """Philox4x32-7 in Python's integers, from the paper."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(7):
        product0, product2 = 0xD2511F53 * c0, 0xCD9E8D57 * c2
        c0, c1, c2, c3 = (
            (product2 >> 32) ^ c1 ^ k0, product2 & 0xFFFFFFFF, (product0 >> 32) ^ c3 ^ k1, product0 & 0xFFFFFFFF
        )  # fmt: skip
        k0, k1 = (k0 + 0x9E3779B9) & 0xFFFFFFFF, (k1 + 0xBB67AE85) & 0xFFFFFFFF
    return c0, c1, c2, c3


def test_reference_is_philox() -> None:
    seed, draw, rows, features, threshold = 0x1234_5678_9ABC_DEF0, 3, 5, 21, 20_000
    rng = torch.tensor([seed, draw])
    keep = reference(rng, STREAM, rows, features, threshold)
    for t in range(rows):
        for k in range(features):
            words = philox((k // 8, t, STREAM, draw), (seed & 0xFFFFFFFF, seed >> 32))
            bits = (words[k % 8 // 2] >> (16 * (k % 2))) & 0xFFFF
            assert bool(keep[t, k]) == (bits >= threshold)


@pytest.mark.parametrize("seed", [0, 42, -1, 2**63 - 1])
@pytest.mark.parametrize(("rows", "features"), [(1, 1), (9, 260), (3, 1000)])
def test_kernel_draws_the_same_bits(device: torch.device, rows: int, features: int, seed: int) -> None:
    rng = new_rng(seed, device)
    advance(rng)
    ones = torch.ones(rows, features, device=device)
    for threshold in (1, 3277, 60_000):
        out = guarded(rows, features, dtype=torch.float32, device=device, stride=features + 5)
        masked(ones, rng, STREAM, threshold, out.view, scale=2.0)
        out.check()
        assert torch.equal(out.view, 2.0 * reference(rng, STREAM, rows, features, threshold))


def test_masks_are_independent_and_have_the_rate() -> None:
    rng, T, K, p = new_rng(7, CPU), 512, 1024, 0.1
    threshold = LoraProjection(1, 1, 1.0, p).threshold
    assert abs(threshold / LEVELS - p) < 1 / LEVELS
    first = reference(rng, 0, T, K, threshold)
    other_stream = reference(rng, 1, T, K, threshold)
    other_seed = reference(new_rng(8, CPU), 0, T, K, threshold)
    advance(rng)
    other_draw = reference(rng, 0, T, K, threshold)
    masks = [first, other_stream, other_seed, other_draw]
    n, p = T * K, threshold / LEVELS
    for a in masks:
        dropped = ~a
        assert abs(float(dropped.double().mean()) - p) < 4.5 * (p * (1 - p) / n) ** 0.5
        for axis, m in ((0, T), (1, K)):  # every row and column, at 6 standard deviations
            assert float((dropped.double().mean(axis) - p).abs().max()) < 6 * (p * (1 - p) / m) ** 0.5
        neighbours = [(a[:, :-1], a[:, 1:]), (a[:-1], a[1:]), (a[:, :-8], a[:, 8:])]
        for x, y in neighbours:
            assert abs(correlation(x, y)) < 4.5 / n**0.5
    for i in range(4):
        for j in range(i):
            assert abs(correlation(masks[i], masks[j])) < 4.5 / n**0.5


def correlation(a: Tensor, b: Tensor) -> float:
    return float(torch.corrcoef(torch.stack([a.flatten().double(), b.flatten().double()]))[0, 1])
