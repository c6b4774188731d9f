"""The layering of docs/architecture.md, held to the imports as they are written."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

SRC = Path(__file__).parents[1] / "src" / "pyralis"

RANK = {
    "errors": 0, "compat": 0,
    "ops": 1,
    "memory": 2, "models": 2, "lora": 2,
    "engine": 3,
    "data": 4, "train": 4, "export": 4, "serve": 4, "bench": 4, "verify": 4,
    "api": 5,
    "cli": 6, "__main__": 7, "__init__": 7,
}  # fmt: skip
# within rank 4 the imports go one way
ORDER_IN_RANK_4 = {"data": 0, "train": 1, "export": 2, "serve": 2, "bench": 2, "verify": 2}


def unit_of(path: Path) -> str:
    relative = path.relative_to(SRC)
    return relative.parts[0] if len(relative.parts) > 1 else relative.stem


def imported_units(path: Path) -> set[str]:
    units: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names = [node.module or ""]
            if node.module == "pyralis":
                names = [f"pyralis.{alias.name}" for alias in node.names]
        for name in names:
            parts = name.split(".")
            if parts[0] == "pyralis" and len(parts) > 1 and parts[1] != "__version__":
                units.add(parts[1])
    return units


FILES = sorted(SRC.rglob("*.py"))


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(SRC)))
def test_imports_go_down(path: Path) -> None:
    unit = unit_of(path)
    for other in imported_units(path) - {unit}:
        assert other in RANK, f"{path.name} imports pyralis.{other}, which has no rank in docs/architecture.md"
        assert RANK[other] <= RANK[unit], f"{path} ({unit}) imports {other}, which is above it"
        if unit in ORDER_IN_RANK_4 and other in ORDER_IN_RANK_4:
            assert ORDER_IN_RANK_4[other] < ORDER_IN_RANK_4[unit], f"{path} ({unit}) imports {other}"


def test_only_compat_looks_at_versions() -> None:
    for path in FILES:
        if path.name == "compat.py":
            continue
        text = path.read_text(encoding="utf-8")
        for sign in (
            "packaging.version",
            "transformers.__version__",
            "torch.__version__ <",
            "torch.__version__ >",
            "is_torch_greater",
        ):
            assert sign not in text, f"{path}: {sign}"


def test_every_unit_has_a_rank() -> None:
    assert {unit_of(p) for p in FILES} <= set(RANK)
