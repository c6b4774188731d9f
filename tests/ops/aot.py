"""Ahead-of-time compilation of every kernel for every GPU class, without a GPU.

Each file of `aot_cases/` has `cases() -> list[Case]`: calls of public functions on meta tensors. What they would launch
is recorded and compiled by Triton for each target; `ptxas -v` tells the spills. Triton under TRITON_INTERPRET cannot
compile, so `test_aot.py` runs this file as a script:

    python tests/ops/aot.py [--full] [--only NAME,NAME] [--targets sm_80,gfx942] [--jobs N]

It prints one JSON object per compiled kernel. What was compiled once is not compiled again (`aot_compile.py`).
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import multiprocessing
import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
sys.path.append(str(HERE.parents[1]))  # as a script it finds itself, not the package of tests

from tests.ops.aot_compile import Compiled, Specialised, Target  # noqa: E402

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


def meta(*shape: int, dtype: Any) -> Any:
    """A tensor without data, for the calls of a `Case`."""
    import torch

    return torch.empty(shape, dtype=dtype, device="meta")


def load_cases(only: list[str] | None = None) -> dict[str, list[Case]]:
    sys.modules.setdefault("tests.ops.aot", sys.modules[__name__])
    found = {}
    for path in sorted((HERE / "aot_cases").glob("*.py")):
        if only is None or path.stem in only:
            spec = importlib.util.spec_from_file_location(f"aot_cases_{path.stem}", path)
            assert spec is not None
            assert spec.loader is not None
            module = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(module)
            found[path.stem] = module.cases()
    assert found, f"no cases for {only}"
    return found


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
            groups.setdefault(kernel.name(), {}).setdefault(key, kernel)
    for group in groups.values():
        kernels = list(group.values())
        yield from kernels if full else [kernels[turn % len(kernels)]]


def compile_all(kernels: list[tuple[Specialised, Target]], jobs: int) -> Iterator[Compiled]:
    """As they are ready, by `jobs` processes: forks, for a kernel is not picklable."""
    global _to_compile
    _to_compile = kernels
    if jobs == 1:
        yield from map(_compile, range(len(kernels)))
        return
    with multiprocessing.get_context("fork").Pool(jobs) as pool:
        yield from pool.imap_unordered(_compile, range(len(kernels)))


_to_compile: list[tuple[Specialised, Target]] = []


def _compile(index: int) -> Compiled:
    kernel, target = _to_compile[index]
    return kernel.compile(target)


def main() -> None:
    parser = argparse.ArgumentParser(description="Compile every kernel for every GPU class.")
    parser.add_argument("--full", action="store_true", help="every configuration, not one of each kernel and target")
    parser.add_argument("--only", help="files of aot_cases")
    parser.add_argument("--targets", default=",".join(t.name for t in TARGETS))
    parser.add_argument("--list", action="store_true", help="name the kernels, compile nothing")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="processes")
    arguments = parser.parse_args()
    wanted = arguments.targets.split(",")
    kernels = [
        (kernel, target)
        for cases in load_cases(arguments.only.split(",") if arguments.only else None).values()
        for turn, target in enumerate(TARGETS)
        if target.name in wanted
        for kernel in plan(cases, target, arguments.full, turn)
    ]
    if arguments.list:
        print(json.dumps(sorted({kernel.name() for kernel, _ in kernels})))
        return
    for compiled in compile_all(kernels, arguments.jobs):
        print(json.dumps(asdict(compiled)), flush=True)


if __name__ == "__main__":
    main()
