"""Launches past Triton's own bookkeeping take the kernels that Triton takes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from pyralis.ops._compiled import specialisation

pytest.importorskip("triton")


def test_every_launch_runs_the_kernel_that_triton_would_run() -> None:
    script = Path(__file__).with_name("compiled_launches.py")
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    results = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(results) == 2 * 24
    assert [r["case"] for r in results if not r["same"]] == []


def test_what_kernels_are_specialised_on() -> None:
    memory = torch.zeros(64, dtype=torch.bfloat16)
    different = [
        (memory,), (memory[1:],), (memory.float(),), (None,), (2.0,), (1,), (2,), (16,), (2**31,), (2**31 + 1,),
        (2**63,), (-1, 1), (1, -1),
    ]  # fmt: skip
    assert len({tuple(specialisation(arguments)) for arguments in different}) == len(different)
    for alike in [(memory, memory[8:]), (2, -3), (16, 0), (1.0, 2.0), (2**31, 2**40)]:
        assert specialisation(alike[:1]) == specialisation(alike[1:])
    with pytest.raises(TypeError, match="constexpr"):
        specialisation((True,))
