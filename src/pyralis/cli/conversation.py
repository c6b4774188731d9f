"""The chat at a terminal: lines in, answers streamed out, commands that begin with a slash. Pipes work too."""

from __future__ import annotations

import contextlib
import sys
from typing import TYPE_CHECKING, TextIO

if TYPE_CHECKING:
    from pyralis.serve.chat import ChatOptions, ChatSession

HELP = """\
/system TEXT   set the system text (without TEXT: show it)
/reset         forget the conversation
/quit          leave; so does Ctrl-D. Ctrl-C stops an answer."""


class Conversation:
    """Reads messages until the end of input or /quit.

    At a terminal it prompts, and says what it does. Where input is a pipe, each line is a message, and only the answers
    go to `out`, one a line or more; everything else goes to `err`.
    """

    def __init__(self, session: ChatSession, options: ChatOptions, *, out: TextIO, err: TextIO) -> None:
        self._session = session
        self._options = options
        self._out = out
        self._err = err
        self._interactive = sys.stdin.isatty() and out.isatty()

    def run(self) -> None:
        if self._interactive:
            with contextlib.suppress(ImportError):
                import readline  # noqa: F401  # line editing and history for input()
            self._say("Ctrl-D or /quit leaves, /help tells more.")
        while (line := self._read()) is not None:
            text = line.strip()
            if not text:
                continue
            if _is_command(text):
                if not self._command(text):
                    return
            else:
                self.answer(text)

    def answer(self, text: str) -> None:
        """Stream the answer to one message; Ctrl-C ends the answer, not the program."""
        pieces = self._session.reply(_whole_characters(text), self._options)
        try:
            for piece in pieces:
                self._out.write(piece)
                self._out.flush()
        except KeyboardInterrupt:
            pieces.close()  # type: ignore[attr-defined]  # a generator
            self._say("\n(stopped)")
            return
        self._out.write("\n\n" if self._interactive else "\n")
        self._out.flush()

    def _read(self) -> str | None:
        """The next line, None at the end of input; Ctrl-C at the prompt throws the line away."""
        while True:
            try:
                return input("> " if self._interactive else "")
            except EOFError:
                if self._interactive:
                    self._say("")
                return None
            except KeyboardInterrupt:
                if not self._interactive:
                    raise
                self._say("\n(Ctrl-D or /quit leaves)")

    def _command(self, text: str) -> bool:
        """Whether to go on."""
        name, _, rest = text.partition(" ")
        rest = rest.strip()
        if name in ("/quit", "/exit"):
            return False
        if name == "/system":
            if rest:
                self._session.system = rest
                self._say("(the system text is set; /reset to begin anew)")
            else:
                self._say(self._session.system or "(the template's own system text, if it has one)")
        elif name == "/reset":
            self._session.reset()
            self._say("(the conversation is forgotten)")
        elif name == "/help":
            self._say(HELP)
        else:
            self._say(f"There is no command {name}.\n{HELP}")
        return True

    def _say(self, text: str) -> None:
        print(text, file=self._err, flush=True)


def _whole_characters(text: str) -> str:
    """Python reads bytes that are not UTF-8 as half characters, which no tokenizer takes."""
    return text.encode("utf-8", "surrogateescape").decode("utf-8", "replace")


def _is_command(text: str) -> bool:
    """`/reset` is one; `/etc/hosts is what?` is a message."""
    name = text.split(maxsplit=1)[0]
    return name.startswith("/") and len(name) > 1 and name[1:].isalpha()
