from __future__ import annotations

import pytest
import torch

from pyralis.ops.gemm import column_sums, gemm
from tests.ops.harness import random


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_gemm_keeps_float32(device: torch.device, dtype: torch.dtype) -> None:
    a, b = random(40, 300, dtype=dtype, device=device, seed=0), random(300, 24, dtype=dtype, device=device, seed=1)
    expected = 1.5 * (a.double() @ b.double())
    out = torch.full((40, 24), float("nan"), device=device)
    gemm(out, a, b, 1.5, accumulate=False)
    torch.testing.assert_close(out.double(), expected, rtol=1e-5, atol=1e-4)
    gemm(out, a, b, 1.5, accumulate=True)
    torch.testing.assert_close(out.double(), 2 * expected, rtol=1e-5, atol=2e-4)


@pytest.mark.parametrize(
    ("out_dtype", "dtype"),
    [(torch.bfloat16, torch.float32), (torch.float16, torch.bfloat16), (torch.bfloat16, torch.float16)],
)
def test_gemm_into_another_half(device: torch.device, out_dtype: torch.dtype, dtype: torch.dtype) -> None:
    """Gradients of adapters that were cast: summed in float32, rounded once."""
    a, b = random(40, 300, dtype=dtype, device=device, seed=0), random(300, 24, dtype=dtype, device=device, seed=1)
    expected = 1.5 * (a.double() @ b.double())
    out = torch.full((40, 24), float("nan"), dtype=out_dtype, device=device)
    gemm(out, a, b, 1.5, accumulate=False)
    torch.testing.assert_close(out.double(), expected.to(out_dtype).double(), rtol=2e-3, atol=1e-2)
    gemm(out, a, b, 1.5, accumulate=True)
    torch.testing.assert_close(out.double(), 2 * expected, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_column_sums(device: torch.device, dtype: torch.dtype) -> None:
    dy = random(500, 24, dtype=dtype, device=device, seed=0)
    out = torch.full((24,), float("nan"), device=device)
    column_sums(dy, out, accumulate=False)
    torch.testing.assert_close(out.double(), dy.double().sum(0), rtol=1e-5, atol=1e-4)
    column_sums(dy, out, accumulate=True)
    torch.testing.assert_close(out.double(), 2 * dy.double().sum(0), rtol=1e-5, atol=2e-4)
