from __future__ import annotations

import pytest
import torch

from pyralis.ops._philox import random_halves, random_halves_of
from pyralis.ops._triton import tl, triton


@triton.jit
def _copy_kernel(seed, draw, first_block, out, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    row = tl.arange(0, ROWS)
    halves = random_halves_of(tl.load(seed), tl.load(draw), row.to(tl.int64) + first_block, ROWS, COLUMNS)
    tl.store(out + row[:, None] * COLUMNS + tl.arange(0, COLUMNS)[None, :], halves.to(tl.int32))


@pytest.mark.parametrize("seed", [0, 7, 2**40 + 5, -3])
def test_kernel_draws_what_the_reference_draws(device: torch.device, seed: int) -> None:
    key, draw = torch.tensor([seed], device=device), torch.tensor(11, dtype=torch.int32, device=device)
    out = torch.empty(4, 256, dtype=torch.int32, device=device)
    _copy_kernel[(1,)](key, draw, 0, out, ROWS=4, COLUMNS=256)
    assert torch.equal(out.flatten(), random_halves(key, draw, 1024))


def test_bits_of_an_element_do_not_depend_on_the_length() -> None:
    key, draw = torch.tensor([3]), torch.tensor(1)
    assert torch.equal(random_halves(key, draw, 1000)[:13], random_halves(key, draw, 13))
    assert not torch.equal(random_halves(key, draw, 64), random_halves(key, draw + 1, 64))
    assert not torch.equal(random_halves(key, draw, 64), random_halves(key + 2**33, draw, 64))


def test_bits_are_uniform() -> None:
    halves = random_halves(torch.tensor([5]), torch.tensor(2), 1 << 18)
    assert halves.min() >= 0
    assert halves.max() < 1 << 16
    for bit in range(16):
        share = float(((halves >> bit) & 1).double().mean())
        assert abs(share - 0.5) < 0.005, f"bit {bit} is set in {share:.4f}"  # 5 standard deviations
    counts = torch.bincount(halves >> 8, minlength=256).double()
    chi_squared = float(((counts - 1024) ** 2 / 1024).sum())
    assert 160 < chi_squared < 370  # 255 degrees of freedom
