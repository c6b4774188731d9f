"""Launches past Triton's own bookkeeping take the kernels that Triton takes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from pyralis.compat import is_known_launcher
from pyralis.ops._compiled import specialisation

pytest.importorskip("triton")


def test_every_launch_runs_the_kernel_that_triton_would_run() -> None:
    script = Path(__file__).with_name("compiled_launches.py")
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    results = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(results) == 3 * 24
    assert [r["case"] for r in results if not r["same"]] == []
    assert {(r["hooks"], r["seen"]) for r in results if r["turn"] == 1} == {(0, 0)}, "straight to the launcher"
    assert {(r["hooks"], r["seen"]) for r in results if r["turn"] == 2} == {(2, 1)}, "a profiler sees every launch"


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


def test_launchers_that_are_known() -> None:
    def of_3_6(gridX: int, gridY: int, gridZ: int, stream: int, function: int, *args: Any) -> None: ...

    def of_3_9(
        gridX: int, gridY: int, gridZ: int, stream: int, function: int, kernel_metadata: Any, launch_metadata: Any,
        launch_enter_hook: Any, launch_exit_hook: Any, *args: Any,
    ) -> None: ...  # fmt: skip

    def of_another(
        gridX: int, gridY: int, gridZ: int, stream: int, function: int, options: Any, *args: Any
    ) -> None: ...

    assert is_known_launcher(of_3_6)
    assert is_known_launcher(of_3_9)
    assert not is_known_launcher(of_another)
    assert not is_known_launcher(lambda gridX, gridY, gridZ, stream, function: None)
