"""Lines in, answers out; commands; Ctrl-C. The session is a stand-in: what it says is not the matter here."""

from __future__ import annotations

import io
from collections.abc import Iterator

import pytest

from pyralis.cli.conversation import Conversation
from pyralis.serve.chat import ChatOptions


class EchoSession:
    system: str | None = None

    def __init__(self) -> None:
        self.resets = 0
        self.closed = False

    def reply(self, text: str, options: ChatOptions) -> Iterator[str]:
        try:
            yield "You said "
            if text == "interrupt":
                raise KeyboardInterrupt
            yield text
        finally:
            self.closed = True

    def reset(self) -> None:
        self.resets += 1


def converse(monkeypatch: pytest.MonkeyPatch, lines: str) -> tuple[str, str, EchoSession]:
    monkeypatch.setattr("sys.stdin", io.StringIO(lines))
    out, err, session = io.StringIO(), io.StringIO(), EchoSession()
    Conversation(session, ChatOptions(), out=out, err=err).run()  # type: ignore[arg-type]
    return out.getvalue(), err.getvalue(), session


def test_each_line_is_a_message_and_only_answers_go_to_stdout(monkeypatch: pytest.MonkeyPatch) -> None:
    out, err, _ = converse(monkeypatch, "hello\n\n  你好  \n")
    assert out == "You said hello\nYou said 你好\n"
    assert err == ""


def test_commands(monkeypatch: pytest.MonkeyPatch) -> None:
    out, err, session = converse(
        monkeypatch, "/system\n/system Be brief.\n/system\n/reset\n/help\n/bogus\n/quit\nnever\n"
    )
    assert out == ""
    assert session.system == "Be brief."
    assert session.resets == 1
    for part in ("the template's own", "Be brief.\n", "is forgotten", "Ctrl-D", "no command /bogus"):
        assert part in err


def test_a_path_is_no_command(monkeypatch: pytest.MonkeyPatch) -> None:
    assert converse(monkeypatch, "/etc/hosts is what?\n")[0] == "You said /etc/hosts is what?\n"


def test_interrupting_an_answer_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    out, err, session = converse(monkeypatch, "interrupt\nhello\n")
    assert out == "You said You said hello\n"
    assert "(stopped)" in err
    assert session.closed


def test_bytes_that_are_not_utf8_are_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    half = b"caf\xe9\n".decode("utf-8", "surrogateescape")  # as Python reads stdin and arguments
    assert converse(monkeypatch, half)[0] == "You said caf\ufffd\n"
