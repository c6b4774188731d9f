"""Ahead-of-time compilation of every kernel for every GPU class, without a GPU.

Each file of `aot_cases/` has `cases() -> list[Case]`: calls of public functions on meta tensors. What they would launch
is recorded and compiled by Triton for each target; `ptxas -v` tells the spills. Triton under TRITON_INTERPRET cannot
compile, so `test_aot.py` runs this file as a script:

    python tests/ops/aot.py [--full] [--only NAME] [--targets sm_80,gfx942]

It prints one JSON object per compiled kernel. Compiled kernels stay in Triton's own cache, keyed by their source.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent


@dataclass(frozen=True)
class Target:
    name: str
    capability: tuple[int, int]
    sm_count: int
    shared_limit: int  # bytes a program may use (opt-in maximum)
    spills_forbidden: bool = False


KIB = 1024
TARGETS = (
    # Triton's documentation starts at compute capability 8.0 (and 7.x in part); 6.1 compiles, PTX and cubin.
    Target("sm_61", (6, 1), 28, 48 * KIB),
    Target("sm_70", (7, 0), 80, 96 * KIB),
    Target("sm_75", (7, 5), 40, 64 * KIB),
    Target("sm_80", (8, 0), 108, 163 * KIB, spills_forbidden=True),
    Target("sm_86", (8, 6), 82, 99 * KIB, spills_forbidden=True),
    Target("sm_89", (8, 9), 128, 99 * KIB, spills_forbidden=True),
    Target("sm_90", (9, 0), 132, 227 * KIB, spills_forbidden=True),
    Target("sm_100", (10, 0), 148, 227 * KIB),
    Target("sm_120", (12, 0), 170, 99 * KIB),
    Target("gfx942", (9, 4), 304, 64 * KIB),
)


@dataclass(frozen=True)
class Case:
    """A call of a public function on meta tensors. `min_capability`: GPUs below never run it (tl.dot below 8.0)."""

    name: str
    call: Callable[[], Any]
    min_capability: tuple[int, int] = (0, 0)


@dataclass(frozen=True)
class Compiled:
    case: str
    kernel: str
    target: str
    settings: str
    shared: int
    registers: int
    spills: int
    error: str | None = None


def meta(*shape: int, dtype: Any) -> Any:
    """A tensor without data, for the calls of a `Case`."""
    import torch

    return torch.empty(shape, dtype=dtype, device="meta")


def load_cases(only: str | None = None) -> dict[str, list[Case]]:
    sys.modules.setdefault("tests.ops.aot", sys.modules[__name__])
    found = {}
    for path in sorted((HERE / "aot_cases").glob("*.py")):
        if only is None or path.stem == only:
            spec = importlib.util.spec_from_file_location(f"aot_cases_{path.stem}", path)
            assert spec is not None
            assert spec.loader is not None
            module = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(module)
            found[path.stem] = module.cases()
    assert found, f"no cases for {only}"
    return found


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

    def settings(self) -> str:
        constants = ", ".join(f"{k}={v}" for k, v in self.constants if v is not None)
        types = " ".join(t for _, t in self.signature if t != "constexpr")
        return f"{types} [{constants}] warps={self.num_warps}"

    def compile(self, target: Target) -> Compiled:
        import triton
        from triton.backends.compiler import GPUTarget
        from triton.compiler import ASTSource

        position = {name: i for i, name in enumerate(self.kernel.arg_names)}
        source = ASTSource(
            self.kernel, dict(self.signature), {(position[n],): v for n, v in self.constants},
            attrs={(position[n],): [["tt.divisibility", 16]] for n in self.divisible},
        )  # fmt: skip
        nvidia = target.name.startswith("sm_")
        gpu = GPUTarget("cuda", int(target.name[3:]), 32) if nvidia else GPUTarget("hip", target.name, 64)
        options = {"num_warps": self.num_warps, "num_stages": self.num_stages, "enable_fp_fusion": self.fp_fusion}
        try:
            kernel = triton.compile(source, target=gpu, options=options)
            registers, spills = ptxas_report(kernel.asm["ptx"], target, self.fp_fusion) if nvidia else (0, 0)
            shared, error = kernel.metadata.shared, None
        except Exception as failure:  # reported per kernel; the test fails on it
            shared = registers = spills = 0
            error = f"{type(failure).__name__}: {failure}"[:2000]
        name = self.kernel.fn.__name__
        return Compiled(self.case, name, target.name, self.settings(), shared, registers, spills, error)


def ptxas_report(ptx: str, target: Target, fp_fusion: bool) -> tuple[int, int]:
    """(registers per thread, spilled bytes) as Triton's bundled ptxas tells; kept by the hash of the PTX."""
    import triton
    from triton.backends.nvidia.compiler import get_ptxas

    key = hashlib.sha256(f"{ptx}{fp_fusion}".encode()).hexdigest()
    cache = Path(triton.knobs.cache.dir) / "ptxas_reports" / f"{key}.json"
    if cache.is_file():
        registers, spills = json.loads(cache.read_text())
        return registers, spills
    major, minor = target.capability
    ptxas = get_ptxas(10 * major + minor).path  # newer GPUs have a newer one
    architecture = re.search(r"\.target (\w+)", ptx)
    assert architecture is not None
    command = [ptxas, "-v", f"--gpu-name={architecture[1]}", *([] if fp_fusion else ["--fmad=false"])]
    cache.parent.mkdir(parents=True, exist_ok=True)
    source = cache.with_suffix(f".{os.getpid()}.ptx")
    source.write_text(ptx)
    try:
        done = subprocess.run([*command, str(source), "-o", os.devnull], capture_output=True, text=True, check=True)
    finally:
        source.unlink()
    registers = int(re.findall(r"Used (\d+) registers", done.stderr)[0])
    spills = sum(int(n) for n in re.findall(r"(\d+) bytes spill", done.stderr))
    part = cache.with_suffix(f".{os.getpid()}")
    part.write_text(json.dumps([registers, spills]))
    part.replace(cache)
    return registers, spills


def plan(cases: list[Case], target: Target, full: bool, turn: int) -> Iterator[Specialised]:
    """The distinct kernels of the cases on a target; unless `full`, one of each kernel, another for each target."""
    from pyralis.ops._triton import Gpu, recording

    groups: dict[str, dict[str, Specialised]] = {}
    for case in cases:
        if target.capability < case.min_capability:
            continue
        with recording(Gpu(target.capability, target.sm_count)) as launches:
            case.call()
        assert launches, f"{case.name} launched nothing"
        for launch in launches:
            kernel = Specialised.of(case.name, launch)
            key = f"{kernel.settings()} {kernel.divisible} {kernel.num_stages} {kernel.fp_fusion}"
            groups.setdefault(kernel.kernel.fn.__name__, {}).setdefault(key, kernel)
    for group in groups.values():
        kernels = list(group.values())
        yield from kernels if full else [kernels[turn % len(kernels)]]


def main() -> None:
    parser = argparse.ArgumentParser(description="Compile every kernel for every GPU class.")
    parser.add_argument("--full", action="store_true", help="every configuration, not one of each kernel and target")
    parser.add_argument("--only", help="one file of aot_cases")
    parser.add_argument("--targets", default=",".join(t.name for t in TARGETS))
    arguments = parser.parse_args()
    wanted = arguments.targets.split(",")
    for op_cases in load_cases(arguments.only).values():
        for turn, target in enumerate(TARGETS):
            if target.name in wanted:
                for kernel in plan(op_cases, target, arguments.full, turn):
                    print(json.dumps(asdict(kernel.compile(target))), flush=True)


if __name__ == "__main__":
    main()
