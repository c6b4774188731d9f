"""Token ids to text as they come: never half a character, never a stop text."""

from __future__ import annotations

from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

# A character is at most 4 bytes, so that many byte tokens; a model that writes broken UTF-8 is not waited for longer.
LONGEST_CHARACTER = 4


class StreamDecoder:
    """Turns a growing list of token ids into pieces of text whose concatenation is the decoded whole.

    A piece is held back while it ends inside a character (Chinese and emoji often span tokens), and while its end may
    be the beginning of a stop text. Only the last two pieces' tokens are decoded at a time.

    Attributes:
        stopped: a stop text was met; nothing comes after it.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, stop_strings: Sequence[str] = ()) -> None:
        self._tokenizer = tokenizer
        self._stops = tuple(stop for stop in stop_strings if stop)
        self._ids: list[int] = []
        self._context = 0  # ids from here are decoded again: a token's text may depend on the one before it
        self._shown = 0  # ids up to here have been decoded
        self._held = ""
        self.stopped = False

    def push(self, token: int) -> str:
        """The text that this token completes; often "", for a while."""
        self._ids.append(token)
        whole = self._decode(self._ids[self._context :])
        waiting = len(self._ids) - self._shown
        if whole.endswith("\ufffd") and waiting < LONGEST_CHARACTER:
            return ""
        piece = whole[len(self._decode(self._ids[self._context : self._shown])) :]
        self._context, self._shown = self._shown, len(self._ids)
        return self._until_stop(piece)

    def finish(self) -> str:
        """What was held back, when no token follows."""
        if self.stopped:
            return ""
        whole = self._decode(self._ids[self._context :])
        rest = whole[len(self._decode(self._ids[self._context : self._shown])) :]
        self._shown = len(self._ids)
        text = self._until_stop(rest)
        text, self._held = text + self._held, ""
        return text

    def _decode(self, ids: list[int]) -> str:
        text = self._tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        assert isinstance(text, str)
        return text

    def _until_stop(self, piece: str) -> str:
        if self.stopped:
            return ""
        text = self._held + piece
        found = [position for stop in self._stops if (position := text.find(stop)) >= 0]
        if found:
            self.stopped, self._held = True, ""
            return text[: min(found)]
        kept = max((_overlap(text, stop) for stop in self._stops), default=0)
        self._held = text[len(text) - kept :]
        return text[: len(text) - kept]


def _overlap(text: str, stop: str) -> int:
    """The length of the longest end of `text` that `stop` begins with."""
    return next((size for size in range(min(len(stop) - 1, len(text)), 0, -1) if stop.startswith(text[-size:])), 0)
