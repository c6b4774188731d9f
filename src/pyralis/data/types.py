"""What a row of training data becomes, whatever format it was written in."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

from pyralis.errors import DataError

Row: TypeAlias = dict[str, Any]
Role: TypeAlias = Literal["system", "user", "assistant", "tool"]
LossOn: TypeAlias = Literal["all_turns", "last_turn", "everything"]


@dataclass(frozen=True, slots=True)
class Source:
    """Where a row came from, for error messages: a file and a 1-based line (JSONL) or row number."""

    file: str
    row: int

    def __str__(self) -> str:
        return f"{self.file}:{self.row}"


OnBad: TypeAlias = Callable[[Source, DataError], None]
"""What is told of a row that cannot be read: its place, and why."""


@dataclass(frozen=True, slots=True)
class Message:
    role: Role
    content: str


@dataclass(frozen=True, slots=True)
class Conversation:
    """A chat: an optional system message first, then turns that end with an assistant message."""

    messages: tuple[Message, ...]
    source: Source


@dataclass(frozen=True, slots=True)
class PlainText:
    """A document, for pretraining."""

    text: str
    source: Source


@dataclass(frozen=True, slots=True)
class PromptCompletion:
    """Raw strings without a chat template; the loss is on the completion (and the EOS behind it)."""

    prompt: str
    completion: str
    source: Source


@dataclass(frozen=True, slots=True)
class Preference:
    """A common history and two continuations of it, the preferred one first."""

    prompt: tuple[Message, ...]
    chosen: tuple[Message, ...]
    rejected: tuple[Message, ...]
    source: Source


Record: TypeAlias = Conversation | PlainText | PromptCompletion | Preference
