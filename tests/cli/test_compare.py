"""`pyralis compare` as a person calls it."""

from __future__ import annotations

from pathlib import Path

import pytest
from typer.testing import CliRunner

from pyralis.cli.main import build_app
from pyralis.errors import DataError
from pyralis.train.report.metric_rows import StepMetrics, to_json


def made(folder: Path, loss: float) -> str:
    folder.mkdir()
    row = StepMetrics(5, 1.0, loss, 1e-4, 0.5, 50, 100, 10.0, 20.0, None, 1.0, 5.0)
    (folder / "metrics.jsonl").write_text(to_json(row) + "\n")
    return str(folder)


def test_table_and_page(tmp_path: Path) -> None:
    runs = [made(tmp_path / "one", 1.5), made(tmp_path / "two", 2.5)]
    page = tmp_path / "compare.html"
    result = CliRunner().invoke(build_app(), ["compare", *runs, "--out", str(page)], catch_exceptions=False)
    assert result.exit_code == 0
    lines = result.output.splitlines()
    assert lines[0].split() == ["one", "two"]
    assert ["loss", "1.5000", "2.5000"] in [line.split() for line in lines]
    assert "These runs have the same config." in lines
    assert lines[-1] == f"page: {page}"
    assert page.read_text(encoding="utf-8").startswith("<!doctype html>")


def test_a_folder_that_is_no_run(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="holds no run"):
        CliRunner().invoke(build_app(), ["compare", str(tmp_path)], catch_exceptions=False)
