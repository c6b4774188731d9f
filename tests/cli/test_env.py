"""`pyralis env`."""

from __future__ import annotations

import json

import pytest
import typer
from typer.testing import CliRunner

from pyralis.cli.env import register
from pyralis.train.report.environment import describe_environment


@pytest.fixture
def app() -> typer.Typer:
    app = typer.Typer()
    app.callback()(lambda: None)  # with a single command typer would take its name away
    register(app)
    return app


def test_it_prints_machine_versions_and_what_works(app: typer.Typer) -> None:
    result = CliRunner().invoke(app, ["env"])
    assert result.exit_code == 0
    for part in ("platform", "torch", "bitsandbytes", "cpu", "gpu", "bf16", "fp16", "NF4", "works"):
        assert part in result.stdout


def test_json(app: typer.Typer) -> None:
    result = CliRunner().invoke(app, ["env", "--json"])
    found = json.loads(result.stdout)
    assert found["cores"] == describe_environment().cores
    assert [c["name"] for c in found["capabilities"]] == ["bf16", "fp16", "NF4"]
