from __future__ import annotations

import math

import pytest
import torch

from pyralis.ops._triton import Gpu
from pyralis.ops.grad_norm import NormLaunch, StepScalars, begin_step, global_norm, supported
from tests.ops.harness import assert_deterministic, random

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
BETAS = {"beta1": 0.9, "beta2": 0.999}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n", [1, 255, 4096, 4097, 40_000])
def test_norm(device: torch.device, n: int, dtype: torch.dtype) -> None:
    grads = random(n, dtype=dtype, device=device, seed=n)
    torch.testing.assert_close(global_norm(grads).double(), grads.double().norm(), rtol=1e-6, atol=0)


def test_clipping_is_torchs(device: torch.device) -> None:
    for scale in (0.001, 1.0):
        grads = random(3000, dtype=torch.float32, device=device, seed=0, scale=scale)
        scalars = StepScalars.new(device)
        begin_step(grads, scalars, **BETAS, max_norm=1.0)
        parameter = torch.nn.Parameter(torch.zeros_like(grads))
        parameter.grad = grads.clone()
        norm = torch.nn.utils.clip_grad_norm_([parameter], 1.0)
        torch.testing.assert_close(scalars.norm, norm, rtol=1e-6, atol=0)
        torch.testing.assert_close(grads * scalars.factor, parameter.grad, rtol=1e-6, atol=0)


def test_loss_scale_is_taken_out_before_clipping(device: torch.device) -> None:
    grads = random(700, dtype=torch.float32, device=device, seed=1)
    plain, scaled = StepScalars.new(device), StepScalars.new(device)
    begin_step(grads, plain, **BETAS, max_norm=0.5)
    begin_step(grads * 1024, scaled, **BETAS, max_norm=0.5, grad_scale=torch.tensor([1024.0], device=device))
    torch.testing.assert_close(scaled.norm, plain.norm)
    torch.testing.assert_close(scaled.factor * 1024, plain.factor)


def test_corrections_and_count(device: torch.device) -> None:
    grads, scalars = torch.ones(5, device=device), StepScalars.new(device)
    for step in range(1, 40):
        begin_step(grads, scalars, beta1=0.9, beta2=0.999, measure=step % 2 == 0)
        assert int(scalars.step) == step
        assert float(scalars.correction1) == pytest.approx(1 - 0.9**step, rel=1e-7)
        assert float(scalars.root_correction2) == pytest.approx(math.sqrt(1 - 0.999**step), rel=1e-7)
    begin_step(grads, scalars, beta1=0.0, beta2=0.0)
    assert float(scalars.correction1) == float(scalars.root_correction2) == 1.0


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("where", [0, 4096, 8999])
def test_not_finite_skips_and_does_not_count(device: torch.device, bad: float, where: int) -> None:
    grads, scalars = torch.ones(9000, device=device), StepScalars.new(device)
    begin_step(grads, scalars, **BETAS)
    assert float(scalars.skip) == 0
    grads[where] = bad
    begin_step(grads, scalars, **BETAS, max_norm=1.0)
    assert float(scalars.skip) == 1
    assert int(scalars.step) == 1
    assert not scalars.norm.isfinite()
    begin_step(grads, scalars, **BETAS, measure=False)  # unread: not known to be bad
    assert float(scalars.skip) == 0


def test_found_inf_skips(device: torch.device) -> None:
    grads, scalars = torch.ones(10, device=device), StepScalars.new(device)
    for measure in (True, False):
        begin_step(grads, scalars, **BETAS, found_inf=torch.ones(1, device=device), measure=measure)
        assert float(scalars.skip) == 1
    begin_step(grads, scalars, **BETAS, found_inf=torch.zeros(1, device=device))
    assert float(scalars.skip) == 0
    assert int(scalars.step) == 1


def test_deterministic(device: torch.device) -> None:
    grads = random(30_001, dtype=torch.bfloat16, device=device, seed=3)
    assert_deterministic(lambda: (global_norm(grads)[None],), times=4)


def test_programs() -> None:
    assert NormLaunch.of(1, 132).programs == 1
    assert NormLaunch.of(10**8, Gpu((9, 0), 132).sm_count).programs == 528
    assert NormLaunch.of(10**9, 10**6).programs == 2048


def test_supported_says_why(device: torch.device) -> None:
    assert supported(torch.zeros(4, device=device)) is None
    assert "not contiguous" in str(supported(torch.zeros(8, device=device)[::2]))
    assert "float64" in str(supported(torch.zeros(4, device=device, dtype=torch.float64)))


@pytest.mark.gpu
def test_more_than_2_31_elements() -> None:
    n = 2**31 + 513
    grads = torch.full((n,), 0.5, dtype=torch.bfloat16, device="cuda")
    assert float(global_norm(grads)) == pytest.approx(0.5 * math.sqrt(n), rel=1e-6)
    grads[n - 1] = float("inf")
    assert not global_norm(grads).isfinite()
