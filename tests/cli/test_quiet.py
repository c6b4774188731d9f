"""The command's log: lines stand whole, also while a spinner turns."""

from __future__ import annotations

import io
import logging
from collections.abc import Iterator

import pytest
from rich.console import Console

from pyralis.cli.quiet import set_up_logging


@pytest.fixture
def logger() -> Iterator[logging.Logger]:
    logger = logging.getLogger("pyralis")
    handlers, level, propagate = logger.handlers[:], logger.level, logger.propagate
    logger.handlers.clear()
    yield logger
    logger.handlers[:], logger.level, logger.propagate = handlers, level, propagate


def test_a_line_logged_under_a_spinner_stands_above_it(logger: logging.Logger) -> None:
    set_up_logging()
    terminal = Console(file=io.StringIO(), force_terminal=True, width=80)
    with terminal.status("reading"):
        logger.info("rows are read as conversation")
    assert "rows are read as conversation\n" in terminal.file.getvalue()  # type: ignore[attr-defined]


def test_elsewhere_it_goes_to_stderr(logger: logging.Logger, capsys: pytest.CaptureFixture[str]) -> None:
    set_up_logging()
    logger.info("one line")
    captured = capsys.readouterr()
    assert captured.err == "one line\n"
    assert captured.out == ""
