"""The machine and the software a run has: for the report, for `pyralis env` and for bug reports."""

from __future__ import annotations

import os
import platform
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch

from pyralis.compat import installed_versions
from pyralis.ops._triton import unavailable

PACKAGES = (
    *("pyralis", "torch", "transformers", "peft", "trl", "accelerate", "datasets", "bitsandbytes", "triton"),
    *("safetensors", "deepspeed", "flash-attn"),
)
SLOW = 2.0
"""From how many times float32's time on a dtype is called slow."""


@dataclass(frozen=True, slots=True)
class Gpu:
    """Memory in GiB; `capability` as (9, 0)."""

    name: str
    memory_gib: float
    capability: tuple[int, int]


@dataclass(frozen=True, slots=True)
class Environment:
    """`packages` are (name, version) of those installed; `cuda` is what torch was built for, None for a CPU build."""

    python: str
    platform: str
    packages: tuple[tuple[str, str], ...]
    cuda: str | None
    gpus: tuple[Gpu, ...]
    cpu: str
    cores: int
    memory_gib: float


@dataclass(frozen=True, slots=True)
class Capability:
    """Whether something works on this machine's device, and what to know about it."""

    name: str
    works: bool
    note: str


def git_commit(folder: Path) -> str | None:
    """The commit that is checked out there, with "-dirty" where tracked files differ from it; None without one."""
    command = ["git", "-C", str(folder), "-c", "core.fsmonitor=false", "describe", "--always", "--dirty", "--exclude=*"]
    try:
        found = subprocess.run(
            [*command, "--abbrev=12"], capture_output=True, text=True, timeout=10, check=True,
            env={**os.environ, "GIT_OPTIONAL_LOCKS": "0"},
        )  # fmt: skip
    except (OSError, subprocess.SubprocessError):
        return None
    return found.stdout.strip() or None


def code_commits() -> dict[str, str]:
    """The commits of the working directory, and of Pyralis where it runs from a checkout of its own repository."""
    package = Path(__file__).parents[2]
    places = {"working directory": Path.cwd()}
    if package.parent.name == "src":  # not in a wheel's site-packages, which may lie in somebody else's repository
        places["pyralis"] = package.parents[1]
    return {name: commit for name, place in places.items() if (commit := git_commit(place)) is not None}


def describe_environment() -> Environment:
    """Versions come from the installed packages' metadata: nothing is imported for it."""
    gpus = []
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        gpus.append(Gpu(properties.name, properties.total_memory / 2**30, (properties.major, properties.minor)))
    return Environment(
        python=platform.python_version(),
        platform=platform.platform(),
        packages=tuple(installed_versions(PACKAGES).items()),
        cuda=torch.version.cuda,
        gpus=tuple(gpus),
        cpu=_cpu_model(),
        cores=_usable_cores(),
        memory_gib=psutil.virtual_memory().total / 2**30,
    )


def probe_capabilities() -> tuple[Capability, ...]:
    """Try bf16, fp16, NF4 and Triton on the GPU, or on the CPU, without one, all but Triton. Takes about a second, most
    of it imports."""
    device = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
    return (
        _probe_dtype("bf16", torch.bfloat16, device),
        _probe_dtype("fp16", torch.float16, device),
        _probe_nf4(device),
        *((_probe_triton(device),) if device.type == "cuda" else ()),
    )


def _probe_triton(device: torch.device) -> Capability:
    problem = unavailable(device)
    return Capability("Triton", problem is None, problem or "")


def _probe_dtype(name: str, dtype: torch.dtype, device: torch.device) -> Capability:
    """A matmul against float32's result; on a CPU its time too, for many have the dtype only in slow emulation."""
    generator = torch.Generator().manual_seed(0)
    a, b = torch.randn(2, 256, 256, generator=generator).to(device)
    try:
        error = (a.to(dtype) @ b.to(dtype)).float().sub(a @ b).abs().max().item()
    except RuntimeError as reason:
        return Capability(name, False, str(reason).splitlines()[0])
    if not error < 1.0:  # rounding of the inputs alone gives 0.2 in bf16
        return Capability(name, False, f"a matrix product is off by {error:.3g}")
    if device.type == "cuda":
        if dtype is torch.bfloat16 and not torch.cuda.is_bf16_supported(including_emulation=False):
            return Capability(name, True, "emulated on this GPU: use fp16")
        return Capability(name, True, "")
    ratio = _matmul_seconds(a.to(dtype), b.to(dtype)) / _matmul_seconds(a, b)
    if ratio > SLOW:
        return Capability(name, True, f"{ratio:.0f} times slower than float32 on this CPU: use float32")
    return Capability(name, True, "")


def _matmul_seconds(a: torch.Tensor, b: torch.Tensor) -> float:
    """The quickest of five, so that another process's work does not count."""
    seconds = []
    for _ in range(5):
        begin = time.perf_counter()
        a @ b
        seconds.append(time.perf_counter() - begin)
    return min(seconds)


def _probe_nf4(device: torch.device) -> Capability:
    """bitsandbytes' quantisation there and back."""
    try:
        from bitsandbytes import functional
    except ImportError as reason:
        return Capability("NF4", False, f"bitsandbytes cannot be imported: {reason}")
    try:
        weight = torch.linspace(-1, 1, 64 * 64, device=device).view(64, 64)
        packed, state = functional.quantize_4bit(weight, quant_type="nf4", compress_statistics=True)
        error = functional.dequantize_4bit(packed, state).sub(weight).abs().max().item()
    except (RuntimeError, NotImplementedError) as reason:
        return Capability("NF4", False, str(reason).splitlines()[0])
    if not error < 0.2:  # half of the widest gap between NF4's levels is 0.15
        return Capability("NF4", False, f"dequantised weights are off by {error:.3g}")
    return Capability("NF4", True, "compute in float32" if device.type == "cpu" else "")


def _cpu_model() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith(("model name", "Model")):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _usable_cores() -> int:
    """The cores this process may run on, which a container may have cut down."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
