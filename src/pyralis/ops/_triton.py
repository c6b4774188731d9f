"""What every op shares: where kernels can run, rounding, and the launch.

Kernels are compiled on a GPU. On a CPU the public functions run their torch `reference`; tests run the kernels there
under Triton's interpreter (`TRITON_INTERPRET=1` before Triton is imported, then `kernels_on_cpu()`).
`recording()` runs nothing and collects the launches instead, so that exactly what is launched can be compiled ahead of
time for GPUs that are not here.
"""
# mypy: allow-untyped-defs, allow-incomplete-defs

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import cache, lru_cache
from types import SimpleNamespace
from typing import Any

import torch

from pyralis.ops._compiled import launch_compiled
from pyralis.ops._start import start_problem

try:
    import triton
    import triton.language as tl
except ImportError:  # no Triton for this platform: the references serve every call

    def _jit(function: Callable | None = None, **options: Any) -> Any:
        return function if function is not None else _jit

    triton = SimpleNamespace(jit=_jit)
    tl = SimpleNamespace(constexpr=lambda value: value)
    HAS_TRITON = False
    INTERPRETED = False
else:
    HAS_TRITON = True
    INTERPRETED = bool(triton.knobs.runtime.interpret)  # fixed when kernels are decorated, that is at import

FLOAT_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
_INTERPRET = tl.constexpr(INTERPRETED)

_cpu_kernels: ContextVar[bool] = ContextVar("cpu_kernels", default=False)
_recorder: ContextVar[tuple[Gpu, list[Launch]] | None] = ContextVar("recorder", default=None)


@dataclass(frozen=True, slots=True)
class Gpu:
    """What launch rules may look at."""

    capability: tuple[int, int]
    sm_count: int


@dataclass(frozen=True, slots=True)
class Launch:
    """One kernel launch, as `recording` saw it."""

    kernel: Any
    grid: tuple[int, ...]
    args: tuple[Any, ...]
    constexprs: dict[str, Any]
    num_warps: int
    num_stages: int
    fp_fusion: bool


@contextmanager
def kernels_on_cpu(enabled: bool = True) -> Iterator[None]:
    """CPU tensors go through the kernels, interpreted, instead of the references. For tests."""
    if enabled and not INTERPRETED:
        raise RuntimeError("set TRITON_INTERPRET=1 before Triton is imported to run kernels on a CPU")
    token = _cpu_kernels.set(enabled)
    try:
        yield
    finally:
        _cpu_kernels.reset(token)


@contextmanager
def recording(gpu: Gpu) -> Iterator[list[Launch]]:
    """Calls with tensors on the `meta` device launch nothing: what would be launched on `gpu` is collected."""
    launches: list[Launch] = []
    token = _recorder.set((gpu, launches))
    try:
        yield launches
    finally:
        _recorder.reset(token)


def unavailable(device: torch.device) -> str | None:
    """Why kernels cannot run on `device`; None if they can."""
    if device.type == "meta":
        return None if _recorder.get() else "meta tensors hold no data"
    if not HAS_TRITON:
        return "Triton is not installed"
    if device.type == "cuda":
        return "Triton was imported with TRITON_INTERPRET=1" if INTERPRETED else start_problem(device)
    if device.type == "cpu":
        return None if _cpu_kernels.get() else "kernels need a GPU"
    return f"no kernels for device type '{device.type}'"


def unsupported_tensors(*tensors: torch.Tensor | None) -> str | None:
    """Why kernels cannot take these tensors (None is skipped): device, dtype, or a last dimension that is strided."""
    first = next(t for t in tensors if t is not None)
    return unavailable(first.device) or unsuited_tensors(*tensors)


def unsuited_tensors(*tensors: torch.Tensor | None) -> str | None:
    """`unsupported_tensors`, wherever kernels can run: what stays true of tensors that stay."""
    device = None
    for t in tensors:
        if t is None:
            continue
        if device is None:
            device = t.device
        elif t.device != device:
            return f"tensors on {device} and {t.device}"
        if t.dtype not in FLOAT_DTYPES:
            return f"dtype {t.dtype}"
        shape = t.shape
        if shape and shape[-1] > 1 and t.stride()[-1] != 1:
            return "the last dimension is not contiguous"
    return None


@lru_cache
def _gpu(index: int) -> Gpu:
    properties = torch.cuda.get_device_properties(index)
    return Gpu((properties.major, properties.minor), properties.multi_processor_count)


def gpu_of(device: torch.device) -> Gpu:
    """The GPU behind `device`; a small invented one under the interpreter."""
    if (recorder := _recorder.get()) is not None:
        return recorder[0]
    if device.type != "cuda":
        return Gpu((8, 0), 2)
    return _gpu(torch.cuda.current_device() if device.index is None else device.index)


def at_least_float32(dtype: torch.dtype) -> torch.dtype:
    """The dtype a reference computes in: float32 for half precisions, float64 for an oracle's float64 inputs."""
    return torch.promote_types(dtype, torch.float32)


def cdiv(a: int, b: int) -> int:
    return -(-a // b)


@cache
def next_power_of_2(n: int) -> int:
    return 1 << max(n - 1, 0).bit_length()


def warps_for(elements: int, per_thread: int = 16, most: int = 16) -> int:
    """Warps for a program over `elements`: 16 per thread are two 16-byte loads of bf16, enough in flight for HBM."""
    return min(max(next_power_of_2(elements // (32 * per_thread)), 1), most)


def launch(
    kernel: Any,
    grid: tuple[int, ...],
    *args: Any,
    device: torch.device,
    num_warps: int,
    num_stages: int = 3,
    fp_fusion: bool = True,
    **constexprs: Any,
) -> None:
    """Launch on `device`'s current stream.

    `fp_fusion=False` forbids contracting a * b + c into one rounding, where bit-equality with another program is
    claimed. It is always passed: Triton 3.10 changes the default.
    """
    if 0 in grid:
        return
    kind = device.type
    if kind == "meta":
        recorder = _recorder.get()
        assert recorder is not None, "a kernel was launched on meta tensors outside recording()"
        recorder[1].append(Launch(kernel, grid, args, constexprs, num_warps, num_stages, fp_fusion))
        return
    if kind != "cuda":
        kernel[grid](*args, **constexprs, num_warps=num_warps, num_stages=num_stages, enable_fp_fusion=fp_fusion)
        return
    index = device.index
    if index == torch.cuda.current_device():
        launch_compiled(kernel, grid, args, constexprs, num_warps, num_stages, fp_fusion, index)
        return
    with torch.cuda.device(device):  # Triton launches on the current device
        launch_compiled(kernel, grid, args, constexprs, num_warps, num_stages, fp_fusion, index)


@triton.jit
def round_to(x, dtype: tl.constexpr):
    """float32 `x` rounded to `dtype` and back. The interpreter truncates to bf16: there it is done on the bits."""
    if dtype == tl.float32:
        rounded = x
    elif _INTERPRET and dtype == tl.bfloat16:
        bits = x.to(tl.uint32, bitcast=True)
        nearest = ((bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000).to(tl.float32, bitcast=True)
        rounded = tl.where(x == x, nearest, x)  # NaN's payload must not carry into the exponent
    else:
        rounded = x.to(dtype).to(tl.float32)
    return rounded


@triton.jit
def store_as(pointer, x, mask):
    """Store float32 `x` in the pointer's dtype, rounded to nearest even."""
    dtype: tl.constexpr = pointer.dtype.element_ty
    tl.store(pointer, round_to(x, dtype).to(dtype), mask=mask)
