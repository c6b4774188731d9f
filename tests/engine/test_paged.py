"""Optimizer states in managed memory: ordinary ones on a CPU, and the same step on a GPU."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from pyralis.engine.flat_parameters import flatten_parameters
from pyralis.engine.optimizer import FlatAdamW
from pyralis.engine.paged import PAGED_FROM, paged_zeros


def test_on_a_cpu_they_are_ordinary() -> None:
    found = paged_zeros(2 * PAGED_FROM, dtype=torch.uint8, device="cpu")
    assert found.shape == (2 * PAGED_FROM,)
    assert not found.any()


@pytest.mark.gpu
@pytest.mark.parametrize("bits", [32, 8])
def test_the_step_is_the_same(bits: int) -> None:
    found = []
    for paged in (False, True):
        torch.manual_seed(0)
        parameter = nn.Parameter(torch.randn(600, 1000, device="cuda", dtype=torch.bfloat16))
        flatten_parameters([parameter])
        before = torch.cuda.memory_allocated()
        optimizer = FlatAdamW([parameter], lr=1e-3, bits=bits, rounding="split", paged=paged)
        taken = torch.cuda.memory_allocated() - before
        # 8 bytes a parameter of 32-bit moments, 2 of 8-bit ones, both with 2 of the split weight and 2 of the gradient.
        assert (taken < 8 * parameter.numel()) is (paged or bits == 8)
        for step in range(3):
            generator = torch.Generator().manual_seed(step)
            parameter.grad = torch.randn(parameter.shape, generator=generator).to(parameter)
            optimizer.step()
        found.append((parameter.detach().clone(), {**optimizer.state_dict()["state"][0]}))
    (p, plain), (q, paged_state) = found
    assert torch.equal(p, q)
    for name in plain.keys() - {"step"}:
        assert torch.equal(plain[name], paged_state[name]), name
