"""What the command says of errors that are nobody's bug."""

from __future__ import annotations

import errno
from collections.abc import Callable
from typing import Any

import pytest

from pyralis.cli import main as command


def failing(error: Exception) -> Callable[[], Callable[..., None]]:
    def run(**_: Any) -> None:
        raise error

    return lambda: run


def test_a_full_disk_anywhere(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(
        command, "build_app", failing(OSError(errno.ENOSPC, "No space left on device", "metrics.jsonl"))
    )
    with pytest.raises(SystemExit) as left:
        command.main([])
    assert left.value.code == 4
    said = " ".join(capsys.readouterr().err.split())
    assert said.startswith("SaveError: No space left on device (metrics.jsonl). Make room, then start again")


def test_other_errors_keep_their_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(command, "build_app", failing(OSError(errno.EIO, "Input/output error")))
    with pytest.raises(OSError, match="Input/output error"):
        command.main([])
