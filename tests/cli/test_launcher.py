"""Firefly's command line becomes ours."""

from __future__ import annotations

import os

import pytest

from pyralis.cli.launcher import parse


def test_plain() -> None:
    assert parse(["--train_args_file", "a.json"]) == ["train", "a.json"]
    assert parse(["--train_args_file=a.json", "--check"]) == ["train", "a.json", "--check"]


def test_overrides_in_both_manners() -> None:
    args = parse(["--train_args_file", "a.json", "--learning-rate", "1e-4", "--run-name=a-b", "max_steps=3", "--bf16"])
    assert args == ["train", "a.json", "learning_rate=1e-4", "run_name=a-b", "max_steps=3", "bf16=true"]


@pytest.mark.parametrize("spelling", ["--local_rank=1", "--local-rank=1"])
def test_launchers_add_the_local_rank(spelling: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    assert parse([spelling, "--train_args_file", "a.json"]) == ["train", "a.json"]
    assert "LOCAL_RANK" not in os.environ
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert parse([spelling, "--train_args_file", "a.json"]) == ["train", "a.json"]
    assert os.environ["LOCAL_RANK"] == "1"
    os.environ.pop("LOCAL_RANK")


def test_the_file_is_required(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse(["learning_rate=1"])
    assert "--train_args_file" in capsys.readouterr().err
