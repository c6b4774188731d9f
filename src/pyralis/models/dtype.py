"""On which device a model lives, and in which dtype it computes there."""

from __future__ import annotations

import os
import re
import time
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal, TypeAlias, cast, get_args

import torch

from pyralis.errors import ModelError

DtypeName: TypeAlias = Literal["auto", "float32", "bfloat16", "float16"]

# bfloat16 on a CPU must win by this much: everything but the matrix products is slower in it.
CPU_BFLOAT16_GAIN = 2.0


@dataclass(frozen=True, slots=True)
class DtypeChoice:
    """The dtype to compute in, and why, where it is not simply what was asked for ("" otherwise)."""

    dtype: torch.dtype
    note: str = ""


def check_dtype_name(name: str) -> DtypeName:
    """`name` if it is a dtype's; ModelError otherwise."""
    if name not in get_args(DtypeName):
        raise ModelError(f"dtype is {name!r}; expected one of {', '.join(get_args(DtypeName))}.")
    return cast("DtypeName", name)


def choose_device() -> torch.device:
    """This process's GPU (`LOCAL_RANK`, as torchrun and accelerate set it), else the CPU.

    Raises:
        ModelError: there is no such GPU, or this torch has no kernels for it.
    """
    if not torch.cuda.is_available():
        return torch.device("cpu")
    index = int(os.environ.get("LOCAL_RANK", "0"))
    count = torch.cuda.device_count()
    if index >= count:
        raise ModelError(
            f"LOCAL_RANK is {index}, but {count} GPU(s) are visible: start at most {count} processes here."
        )
    device = torch.device("cuda", index)
    _check_kernels(device)
    return device


@lru_cache
def _check_kernels(device: torch.device) -> None:
    """Raise ModelError for a GPU that torch was built without: torch sees it, and the first kernel fails."""
    built_for, capability = torch.cuda.get_arch_list(), torch.cuda.get_device_capability(device)
    codes = [found for arch in built_for if (found := re.fullmatch(r"(sm|compute)_(\d+)(\d)([af]?)", arch))]
    if not codes or any(_runs_on(capability, *code.groups()) for code in codes):
        return
    older = "its CUDA 12.6 wheels have: pip install 'torch<2.15' --index-url https://download.pytorch.org/whl/cu126"
    raise ModelError(
        f"PyTorch {torch.__version__} has no kernels for {torch.cuda.get_device_name(device)}, whose compute "
        f"capability is {capability[0]}.{capability[1]}; it was built for {', '.join(built_for)}. "
        f"Install one that has: {older if capability < (7, 5) else 'a newer one, built for a newer CUDA'}."
    )


def _runs_on(capability: tuple[int, int], kind: str, major: str, minor: str, variant: str) -> bool:
    """Whether code built for an architecture runs on a GPU: binaries on that one and later ones of its generation, PTX
    on all later ones, of variant "a" only on that one (CUDA C++ Programming Guide, "Binary Compatibility")."""
    built = (int(major), int(minor))
    if variant == "a" or built > capability:
        return built == capability
    return built[0] == capability[0] or (kind == "compute" and not variant)


def choose_dtype(requested: DtypeName, device: torch.device) -> DtypeChoice:
    """The dtype to compute in.

    `auto` is bfloat16 on a GPU that has it and float16 on one that has not (V100, T4). A CPU computes in float32,
    unless it is much faster in bfloat16, which is measured: without AMX or AVX512-BF16 a step takes 15x longer in it.

    Raises:
        ModelError: bfloat16 was asked for on a GPU that only emulates it.
    """
    if device.type == "cuda":
        # torch.cuda.is_bf16_supported tells of the current device, which may be another one.
        has_bfloat16 = torch.version.hip is not None or torch.cuda.get_device_capability(device) >= (8, 0)
        name = torch.cuda.get_device_name(device)
        if requested == "auto":
            if has_bfloat16:
                return DtypeChoice(torch.bfloat16)
            return DtypeChoice(torch.float16, f"float16: {name} has no bfloat16")
        if requested == "bfloat16" and not has_bfloat16:
            raise ModelError(f"{name} has no bfloat16: use float16 (`fp16: true`, `bf16: false`) or float32.")
        if requested == "float16" and has_bfloat16:
            return DtypeChoice(
                torch.float16, f"float16 as asked; {name} also has bfloat16, which needs no loss scaling"
            )
        return DtypeChoice(getattr(torch, requested))

    if requested == "float16":
        return DtypeChoice(torch.float32, "float32 instead of float16: a CPU does not train in float16")
    if requested == "float32":
        return DtypeChoice(torch.float32)
    gain = cpu_bfloat16_gain()
    if gain >= CPU_BFLOAT16_GAIN:
        return DtypeChoice(torch.bfloat16, f"bfloat16: this CPU multiplies {gain:.1f}x faster in it than in float32")
    if requested == "bfloat16":
        return DtypeChoice(torch.float32, "float32 instead of bfloat16: this CPU has no fast bfloat16")
    return DtypeChoice(torch.float32)


@lru_cache(maxsize=1)
def cpu_bfloat16_gain() -> float:
    """How much faster this CPU does a layer's three matrix products in bfloat16; 0.0 without the instructions."""
    if not (_cpu_has("_is_avx512_bf16_supported") or _cpu_has("_is_amx_tile_supported")):
        return 0.0
    return _product_seconds(torch.float32) / _product_seconds(torch.bfloat16)


def _cpu_has(probe: str) -> bool:
    supported = getattr(torch.cpu, probe, None)  # private in torch, so it may go away
    return bool(supported and supported())


def _product_seconds(dtype: torch.dtype) -> float:
    """The best of 3 of x W^T, g W and g^T x at 256 x 1024 x 1024 (15 ms in float32 on one core)."""
    x, weight, gradient = (torch.ones(size, 1024, dtype=dtype) for size in (256, 1024, 256))
    best = float("inf")
    for _ in range(3):
        start = time.perf_counter()
        torch.nn.functional.linear(x, weight)
        gradient @ weight
        gradient.t() @ x
        best = min(best, time.perf_counter() - start)
    return best
