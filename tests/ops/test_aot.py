"""Every kernel compiles for every GPU class, within its shared memory and without register spills."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys

import pytest

from tests.ops.aot import HERE, TARGETS, Compiled

OPS = sorted(path.stem for path in (HERE / "aot_cases").glob("*.py"))
LIMITS = {target.name: target for target in TARGETS}


def run(*options: str) -> list[str]:
    """The lines that aot.py prints; it compiles, so Triton must not be interpreting there."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, str(HERE / "aot.py"), *options]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=HERE.parents[1])
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout.splitlines()


def compile_all(op: str, *options: str) -> list[Compiled]:
    return [Compiled(**json.loads(line)) for line in run("--only", op, *options) if line.startswith("{")]


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
    found = {result.target for result in results}
    lowest = min(LIMITS[name].capability for name in found)
    assert lowest <= (8, 0)  # kernels with tl.dot are for no older GPU
    assert found == {name for name, target in LIMITS.items() if target.capability >= lowest}
    check(results)


@pytest.mark.full  # minutes per op when Triton's cache is cold
@pytest.mark.parametrize("op", OPS)
def test_every_configuration_compiles_for_each_gpu(op: str) -> None:
    check(compile_all(op, "--full"))


def test_every_kernel_has_cases() -> None:
    kernel = re.compile(r"^@triton\.jit.*\ndef (\w*kernel)\(", re.MULTILINE)
    files = (HERE.parents[1] / "src/pyralis/ops").glob("*.py")
    written = {f"{path.stem}.{name}" for path in files for name in kernel.findall(path.read_text(encoding="utf-8"))}
    assert written == set(json.loads(run("--list")[-1]))
