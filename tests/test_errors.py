"""Messages reach a terminal: what a file put into them must not move its cursor, or fail to be printed."""

from __future__ import annotations

import pytest

from pyralis.errors import ConfigError, FetchError, PyralisError, SaveError


@pytest.mark.parametrize("kind", [PyralisError, ConfigError, FetchError])
def test_what_no_terminal_should_get_is_escaped(kind: type[PyralisError]) -> None:
    assert str(kind("a\ud800b\x1b[2J\x00\x9bc")) == r"a\ud800b\x1b[2J\x00\x9bc"


def test_text_stays_as_it_is() -> None:
    text = "第一行\n\t第二行　é😀"
    assert str(ConfigError(text)) == text
    assert str(SaveError(28, "No space left on device", "f")) == "[Errno 28] No space left on device: 'f'"
