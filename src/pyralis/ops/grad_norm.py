"""What a step of an optimizer needs as scalars on the device: the gradient's norm, clipping, skipping, counting.

    norm       = ||g|| / grad_scale
    factor     = min(1, max_norm / (norm + 1e-6)) / grad_scale         what the gradient is multiplied with
    skip       = ||g||^2 is not finite in float32, or found_inf != 0
    step      += 1 unless skip
    correction = 1 - beta^step                                         in float64, rounded at the end

Two launches without atomics, so that two runs on one GPU agree bit by bit: the programs of the first note the sums of
their shares of the squares, the one program of the second adds these in float64 and computes what is scalar. (A single
launch, its last program doing this, needs acquire and release, which compute capability 6 does not have.)

Shapes: n elements of a flat gradient buffer.
"""
# mypy: allow-untyped-defs, allow-incomplete-defs

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from pyralis.ops._triton import cdiv, gpu_of, launch, tl, triton, unsupported_tensors

MOST_PROGRAMS = 2048
_NORM, _FACTOR, _SKIP, _CORRECTION1, _ROOT_CORRECTION2 = range(5)


@dataclass(frozen=True, slots=True)
class StepScalars:
    """Scalars of a step, on the device: `begin_step` writes them, `adamw_step` reads them, no value visits the CPU."""

    values: Tensor  # [5] float32: norm, factor, skip, 1 - beta1^step, sqrt(1 - beta2^step)
    step: Tensor  # [] int32: steps taken, the present one included
    partials: Tensor  # [MOST_PROGRAMS] float32, workspace

    @classmethod
    def new(cls, device: torch.device | str) -> StepScalars:
        values = torch.tensor([0.0, 1.0, 0.0, 1.0, 1.0], device=device)
        step = torch.zeros((), dtype=torch.int32, device=device)
        return cls(values, step, torch.zeros(MOST_PROGRAMS, device=device))

    @property
    def norm(self) -> Tensor:
        """[] float32: the norm of the unscaled gradient; infinite or NaN when it is not finite."""
        return self.values[_NORM]

    @property
    def factor(self) -> Tensor:
        return self.values[_FACTOR]

    @property
    def skip(self) -> Tensor:
        """[] float32: 1 when the step leaves parameters and states as they are, else 0."""
        return self.values[_SKIP]

    @property
    def correction1(self) -> Tensor:
        return self.values[_CORRECTION1]

    @property
    def root_correction2(self) -> Tensor:
        return self.values[_ROOT_CORRECTION2]


@dataclass(frozen=True, slots=True)
class NormLaunch:
    """Programs stay on the GPU and walk over the tiles: four to a multiprocessor keep enough loads in flight."""

    block: int
    programs: int
    num_warps: int = 8

    @classmethod
    def of(cls, n: int, sm_count: int) -> NormLaunch:
        block = 4096
        return cls(block, max(1, min(cdiv(n, block), 4 * sm_count, MOST_PROGRAMS)))


def supported(grads: Tensor, *others: Tensor | None) -> str | None:
    """Why the kernel cannot take these tensors; None if it can."""
    if not grads.is_contiguous():
        return "the gradient buffer is not contiguous"
    return unsupported_tensors(grads, *others)


def reference(grads: Tensor) -> Tensor:
    """[] float64: the norm."""
    return torch.linalg.vector_norm(grads, dtype=torch.float64)


def begin_step(
    grads: Tensor,
    scalars: StepScalars,
    *,
    beta1: float,
    beta2: float,
    max_norm: float | None = None,
    grad_scale: Tensor | None = None,
    found_inf: Tensor | None = None,
    measure: bool = True,
) -> None:
    """Write `scalars` for the step that is about to be taken with `grads` [n] (float32, float16 or bfloat16).

    max_norm: clip to this norm, like `torch.nn.utils.clip_grad_norm_`. grad_scale: [] or [1] float32, what the loss was
    multiplied with. found_inf: [] or [1] float32, not 0 to skip the step, as `torch.amp.GradScaler` hands over.
    measure: False leaves the gradient unread (norm 0, no clipping, skipped by `found_inf` alone).
    """
    assert measure or max_norm is None, "clipping needs the norm"
    log1, log2 = (math.log(beta) if beta > 0 else -1e4 for beta in (beta1, beta2))
    if supported(grads, grad_scale, found_inf) is not None:
        _begin_by_reference(grads if measure else None, scalars, log1, log2, max_norm, grad_scale, found_inf)
        return
    device, programs = grads.device, 0
    if measure:
        plan = NormLaunch.of(grads.numel(), gpu_of(device).sm_count)
        programs = plan.programs
        launch(
            _squares_kernel, (programs,), grads, scalars.partials, grads.numel(),
            device=device, num_warps=plan.num_warps, BLOCK=plan.block,
        )  # fmt: skip
    launch(
        _scalars_kernel, (1,), scalars.partials, scalars.values, scalars.step, grad_scale, found_inf,
        programs, 0.0 if max_norm is None else float(max_norm),
        device=device, num_warps=4, LOG_BETA1=log1, LOG_BETA2=log2, CLIP=max_norm is not None, MOST=MOST_PROGRAMS,
    )  # fmt: skip


def global_norm(grads: Tensor, scalars: StepScalars | None = None) -> Tensor:
    """[] float32: the norm of a flat buffer, on the device; what `begin_step` also writes goes to `scalars`."""
    scalars = StepScalars.new(grads.device) if scalars is None else scalars
    begin_step(grads, scalars, beta1=0.0, beta2=0.0)
    return scalars.norm.clone()


def _begin_by_reference(
    grads: Tensor | None,
    scalars: StepScalars,
    log1: float,
    log2: float,
    max_norm: float | None,
    grad_scale: Tensor | None,
    found_inf: Tensor | None,
) -> None:
    values = scalars.values
    square = torch.zeros_like(values[0], dtype=torch.float64) if grads is None else reference(grads).square()
    inverse = torch.ones_like(values[0]) if grad_scale is None else grad_scale.reshape(()).float().reciprocal()
    norm = square.sqrt().float() * inverse
    skip = ~square.float().isfinite()
    if found_inf is not None:
        skip = skip | (found_inf.reshape(()) != 0)
    factor = inverse if max_norm is None else inverse * (max_norm / (norm + 1e-6)).clamp(max=1.0)
    scalars.step.add_(~skip)
    step = scalars.step.double()
    corrections = 1 - (step * log1).exp(), (1 - (step * log2).exp()).sqrt()
    values.copy_(torch.stack([norm, factor, skip.float(), *(c.float() for c in corrections)]))


@triton.jit
def _squares_kernel(grads, partials, n, BLOCK: tl.constexpr):
    total = tl.zeros([BLOCK], tl.float32)
    for tile in range(tl.program_id(0).to(tl.int64), tl.cdiv(n, BLOCK), tl.num_programs(0)):
        at = tile * BLOCK + tl.arange(0, BLOCK)
        g = tl.load(grads + at, mask=at < n, other=0.0).to(tl.float32)
        total += g * g
    tl.store(partials + tl.program_id(0), tl.sum(total, 0))


@triton.jit(do_not_specialize=["programs"])
def _scalars_kernel(
    partials, values, step, grad_scale, found_inf, programs, max_norm,
    LOG_BETA1: tl.constexpr, LOG_BETA2: tl.constexpr, CLIP: tl.constexpr, MOST: tl.constexpr,
):  # fmt: skip
    which = tl.arange(0, MOST)
    square = tl.sum(tl.load(partials + which, mask=which < programs, other=0.0).to(tl.float64), 0)
    inverse = 1.0
    if grad_scale is not None:
        inverse = tl.div_rn(1.0, tl.load(grad_scale).to(tl.float32))
    norm = tl.sqrt(square).to(tl.float32) * inverse
    skip = (tl.abs(square.to(tl.float32)) < float("inf")) == 0  # also when it is NaN
    if found_inf is not None:
        skip = skip | (tl.load(found_inf) != 0)
    factor = inverse
    if CLIP:
        factor = inverse * tl.minimum(tl.div_rn(max_norm, norm + 1e-6), 1.0)
    count = tl.load(step) + 1 - skip.to(tl.int32)
    tl.store(step, count)
    power = count.to(tl.float64)
    correction1 = 1.0 - tl.exp(power * LOG_BETA1)
    correction2 = 1.0 - tl.exp(power * LOG_BETA2)
    tl.store(values, norm)
    tl.store(values + 1, factor)
    tl.store(values + 2, skip.to(tl.float32))
    tl.store(values + 3, correction1.to(tl.float32))
    tl.store(values + 4, tl.sqrt(correction2).to(tl.float32))
