"""A kernel's launch compiled for a GPU that is not here, with what `ptxas -v` says of it.

Reports are kept beside Triton's cache, by the hash of all that enters the compilation; what is compiled is not kept.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import re
import subprocess
import tempfile
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Target:
    name: str
    capability: tuple[int, int]
    sm_count: int
    shared_limit: int  # bytes a program may use (opt-in maximum)
    spills_forbidden: bool = False


@dataclass(frozen=True)
class Compiled:
    case: str
    kernel: str
    target: str
    settings: str
    shared: int
    registers: int
    spills: int
    seconds: float  # to compile it, also when it was compiled before
    error: str | None = None


def triton_type(value: Any) -> str:
    import torch

    if isinstance(value, torch.Tensor):
        names = {
            torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16", torch.float64: "fp64",
            torch.uint8: "u8", torch.int8: "i8", torch.int16: "i16", torch.int32: "i32", torch.int64: "i64",
            torch.bool: "i1",
        }  # fmt: skip
        return "*" + names[value.dtype]
    if isinstance(value, bool):
        return "i1"
    if isinstance(value, int):
        return "i32" if -(2**31) <= value < 2**31 else "i64"
    assert isinstance(value, float), f"{value!r} as a kernel argument"
    return "fp32"


@dataclass(frozen=True)
class Specialised:
    """A launch as Triton's run time would compile it: None and 1 become constants, multiples of 16 are noted."""

    case: str
    kernel: Any
    signature: tuple[tuple[str, str], ...]
    constants: tuple[tuple[str, Any], ...]
    divisible: tuple[str, ...]
    num_warps: int
    num_stages: int
    fp_fusion: bool

    @classmethod
    def of(cls, case: str, launch: Any) -> Specialised:
        names = launch.kernel.arg_names
        values = {**dict(zip(names, launch.args)), **launch.constexprs}
        signature, constants, divisible = [], [], []
        for parameter in launch.kernel.params:
            name, value = parameter.name, values[parameter.name]
            special = not parameter.do_not_specialize
            one = special and type(value) is int and value == 1
            if parameter.is_constexpr or value is None or one:
                signature.append((name, "constexpr"))
                constants.append((name, value))
                continue
            signature.append((name, triton_type(value)))
            if not isinstance(value, (int, float)) or (special and type(value) is int and value % 16 == 0):
                divisible.append(name)
        return cls(
            case, launch.kernel, tuple(signature), tuple(constants), tuple(divisible),
            launch.num_warps, launch.num_stages, launch.fp_fusion,
        )  # fmt: skip

    def name(self) -> str:
        """file.kernel"""
        return f"{Path(self.kernel.fn.__code__.co_filename).stem}.{self.kernel.fn.__name__}"

    def settings(self) -> str:
        constants = ", ".join(f"{k}={v}" for k, v in self.constants if v is not None)
        types = " ".join(t for _, t in self.signature if t != "constexpr")
        return f"{types} [{constants}] warps={self.num_warps}"

    def compile(self, target: Target) -> Compiled:
        """Compile, or find the report of the same compilation. Errors are reported: the test fails on them."""
        import triton
        from triton.backends.compiler import GPUTarget
        from triton.compiler import ASTSource, make_backend

        position = {name: i for i, name in enumerate(self.kernel.arg_names)}
        source = ASTSource(
            self.kernel, dict(self.signature), {(position[n],): v for n, v in self.constants},
            attrs={(position[n],): [["tt.divisibility", 16]] for n in self.divisible},
        )  # fmt: skip
        nvidia = target.name.startswith("sm_")
        gpu = GPUTarget("cuda", int(target.name[3:]), 32) if nvidia else GPUTarget("hip", target.name, 64)
        options = {"num_warps": self.num_warps, "num_stages": self.num_stages, "enable_fp_fusion": self.fp_fusion}
        key = f"{triton.__version__} {make_backend(gpu).hash()} {source.hash()} {sorted(options.items())}"
        report = reports_folder() / f"{hashlib.sha256(key.encode()).hexdigest()}.json"
        if report.is_file():
            kept = Compiled(**json.loads(report.read_text()))
            return replace(kept, case=self.case, settings=self.settings())
        started = time.monotonic()
        try:
            kernel, log = compile_with_log(source, gpu, options)
            registers, spills = (
                ptxas_figures(log or ptxas_log(kernel.asm["ptx"], target, self.fp_fusion)) if nvidia else (0, 0)
            )
            shared, error = kernel.metadata.shared, None
        except Exception as failure:
            shared = registers = spills = 0
            error = f"{type(failure).__name__}: {failure}"[:2000]
        compiled = Compiled(
            self.case, self.kernel.fn.__name__, target.name, self.settings(), shared, registers, spills,
            round(time.monotonic() - started, 2), error,
        )  # fmt: skip
        if error is None:
            part = report.with_suffix(f".{os.getpid()}")
            part.write_text(json.dumps(asdict(compiled)))
            part.replace(report)
        return compiled


def reports_folder() -> Path:
    import triton

    folder = Path(triton.knobs.cache.dir) / "aot_reports"
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def compile_with_log(source: Any, gpu: Any, options: dict[str, Any]) -> tuple[Any, str]:
    """(the compiled kernel, what Triton's own run of ptxas said)"""
    import triton

    printed = io.StringIO()
    with (
        tempfile.TemporaryDirectory() as folder,
        triton.knobs.cache.scope(),
        triton.knobs.nvidia.scope(),
        contextlib.redirect_stdout(printed),
    ):
        triton.knobs.cache.dir = folder
        triton.knobs.nvidia.dump_ptxas_log = True  # to stdout
        kernel = triton.compile(source, target=gpu, options=options)
    log = printed.getvalue()
    return kernel, log if "registers" in log else ""


def ptxas_log(ptx: str, target: Target, fp_fusion: bool) -> str:
    """What Triton's bundled ptxas says, where Triton does not print it."""
    from triton.backends.nvidia.compiler import get_ptxas

    major, minor = target.capability
    ptxas = get_ptxas(10 * major + minor).path  # newer GPUs have a newer one
    architecture = re.search(r"\.target (\w+)", ptx)
    assert architecture is not None
    options = ["-v", f"--gpu-name={architecture[1]}", *([] if fp_fusion else ["--fmad=false"])]
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "kernel.ptx"
        source.write_text(ptx)
        command = [ptxas, *options, str(source), "-o", os.devnull]
        return subprocess.run(command, capture_output=True, text=True, check=True).stderr


def ptxas_figures(log: str) -> tuple[int, int]:
    """(registers per thread, spilled bytes)"""
    spills = sum(int(n) for n in re.findall(r"(\d+) bytes spill", log))
    return int(re.findall(r"Used (\d+) registers", log)[0]), spills
