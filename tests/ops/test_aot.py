"""Every kernel compiles for every GPU class, within its shared memory and without register spills."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.ops.aot import HERE, TARGETS, Compiled

OPS = sorted(path.stem for path in (HERE / "aot_cases").glob("*.py"))
LIMITS = {target.name: target for target in TARGETS}


def compile_all(op: str, *options: str) -> list[Compiled]:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, str(HERE / "aot.py"), "--only", op, *options]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=HERE.parents[1])
    assert done.returncode == 0, done.stderr[-4000:]
    return [Compiled(**json.loads(line)) for line in done.stdout.splitlines() if line.startswith("{")]


def check(results: list[Compiled]) -> None:
    assert results
    problems = []
    for result in results:
        target = LIMITS[result.target]
        where = f"{result.kernel} for {result.target}, {result.case}: {result.settings}"
        if result.error is not None:
            problems.append(f"{where}: {result.error}")
        if result.shared > target.shared_limit:
            problems.append(f"{where}: {result.shared} bytes of shared memory, the limit is {target.shared_limit}")
        if result.spills and target.spills_forbidden:
            problems.append(f"{where}: {result.spills} bytes of spills at {result.registers} registers")
    assert not problems, "\n".join(problems)


@pytest.mark.parametrize("op", OPS)
def test_each_kernel_compiles_for_each_gpu(op: str) -> None:
    results = compile_all(op)
    assert {result.target for result in results} == set(LIMITS)
    check(results)


@pytest.mark.full  # minutes per op when Triton's cache is cold
@pytest.mark.parametrize("op", OPS)
def test_every_configuration_compiles_for_each_gpu(op: str) -> None:
    check(compile_all(op, "--full"))


def test_every_kernel_file_has_cases() -> None:
    source = Path(HERE.parents[1] / "src" / "pyralis" / "ops")
    with_kernels = {
        p.stem for p in source.glob("*.py") if "@triton.jit" in p.read_text() and not p.stem.startswith("_")
    }
    assert with_kernels <= set(OPS), f"no file in aot_cases for {sorted(with_kernels - set(OPS))}"
