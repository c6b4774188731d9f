"""Untrusted input drawn from a fuzzer's bytes: any JSON, a good value with parts of it changed, a damaged file."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any, TypeVar

T = TypeVar("T")

ODD_TEXTS = (
    *("", " ", "\n", "\x00", "\ud800", "\u2028", "\x1b[2J", "e\u0301", "𠀀" * 40, "a" * 5000, "<|im_end|>", "</s>"),
    *("..", ".", "/", "../../x", "/etc/passwd", "~/x", "%s%n{0}{x}", "{{ 7 * 7 }}", "NaN", "-1", "1e400", "null"),
    *("!!python/object/apply:os.system [x]", "&a [*a]", "checkpoint-1", "C:\\x", "\ufeff", "True", "float16", "cuda"),
)
ODD_NUMBERS = (0, 1, -1, 2, 7, 255, 2**31, 2**63, 2**64, -(2**63), 10**30, 0.0, 0.5, -0.5, 1e308, 1e-320)
NOT_FINITE = (float("nan"), float("inf"), float("-inf"))


class Draw:
    """Choices made by the fuzzer. When its bytes are used up every choice is the first one, so that all ends."""

    def __init__(self, data: bytes) -> None:
        from atheris import FuzzedDataProvider

        self._bytes = FuzzedDataProvider(data)

    def number(self, low: int, high: int) -> int:
        return int(self._bytes.ConsumeIntInRange(low, high))

    def flag(self) -> bool:
        return bool(self._bytes.ConsumeBool())

    def one_of(self, choices: Sequence[T]) -> T:
        return choices[self.number(0, len(choices) - 1)]

    def raw(self, most: int) -> bytes:
        return bytes(self._bytes.ConsumeBytes(self.number(0, most)))

    def text(self, most: int = 12) -> str:
        return self.one_of(ODD_TEXTS) if self.flag() else str(self._bytes.ConsumeUnicode(self.number(0, most)))

    def json(self, keys: Sequence[str], depth: int = 4) -> Any:
        """Any JSON value; its keys are mostly of `keys`."""
        kind = self.number(0, 8 if depth > 0 else 5)
        if kind <= 1:
            return (None, True)[kind]
        if kind == 2:
            return self.one_of(ODD_NUMBERS)
        if kind == 3:
            return self.number(-300, 300) if self.flag() else self.one_of((False, *NOT_FINITE))
        if kind in (4, 5):
            return self.text()
        if kind == 6:
            return [self.json(keys, depth - 1) for _ in range(self.number(0, 4))]
        return {self.key(keys): self.json(keys, depth - 1) for _ in range(self.number(0, 4))}

    def key(self, keys: Sequence[str]) -> str:
        return self.one_of(keys) if keys and self.number(0, 3) else self.text()

    def changed(self, value: T, keys: Sequence[str] = ()) -> T:
        """A copy with one to four of its parts replaced, taken out, added or doubled; now and then not a part."""
        holder = {"": copy.deepcopy(value)}
        for _ in range(self.one_of((1, 1, 2, 4))):
            self._change(holder, keys)
        return holder.get("", value)

    def _change(self, holder: Any, keys: Sequence[str]) -> None:
        """Walk down from `holder`, then change something."""
        place: Any = ""
        for _ in range(self.number(1, 6)):
            inner = holder[place]
            places = (
                list(inner) if isinstance(inner, dict) else list(range(len(inner))) if isinstance(inner, list) else []
            )
            if not places:
                break
            holder, place = inner, self.one_of(places)
        action = self.number(0, 5)
        if action == 0 and place != "":
            del holder[place]
        elif action == 1 and isinstance(holder, dict) and place != "":
            holder[self.key(keys)] = self.json(keys)
        elif action == 2 and isinstance(holder, list):
            holder.insert(place, copy.deepcopy(holder[place]))
        elif action == 3 and isinstance(holder[place], str):
            holder[place] = self.text() + holder[place] if self.flag() else holder[place] + self.text()
        else:
            holder[place] = self.json(keys)

    def damaged(self, content: bytes, words: Sequence[bytes] = ()) -> bytes:
        """Bytes of `content` changed, put in, taken out, doubled or cut off; or anything at all."""
        if self.number(0, 15) == 15:
            return self.raw(200)
        found = bytearray(content)
        for _ in range(self.one_of((1, 1, 1, 2, 3, 6))):
            start = self.number(0, len(found))
            end = min(len(found), start + self.number(0, 24))
            action = self.number(0, 4)
            if action == 0 and words:
                found[start:end] = self.one_of(words)
            elif action == 1:
                found[start:start] = found[self.number(0, len(found)) :][:40]
            elif action == 2 and self.flag():
                del found[start:]
            else:
                found[start:end] = self.raw(8)
        return bytes(found)
