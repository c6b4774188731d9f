"""`import pyralis` is light and touches nothing else."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import pyralis

HEAVY = ("torch", "transformers", "peft", "trl", "datasets", "pydantic", "rich", "typer", "matplotlib")


def test_import_is_lazy_and_quick() -> None:
    code = f"import sys, pyralis; assert not [m for m in {HEAVY!r} if m in sys.modules]; dir(pyralis)"
    best = float("inf")
    for _ in range(3):  # the first may read from a cold disk
        start = time.perf_counter()
        subprocess.run([sys.executable, "-c", code], check=True)
        best = min(best, time.perf_counter() - start)
    assert best < 1.0, f"import pyralis takes {best:.2f} s"


def test_import_sets_no_environment() -> None:
    code = "import os; before = dict(os.environ); import pyralis; assert dict(os.environ) == before"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_every_public_name_resolves() -> None:
    code = "import pyralis; [getattr(pyralis, name) for name in pyralis.__all__]"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_no_public_name_is_hidden_by_a_package() -> None:
    packages = {path.stem for path in Path(pyralis.__file__).parent.iterdir()}
    assert not packages & set(pyralis.__all__)
