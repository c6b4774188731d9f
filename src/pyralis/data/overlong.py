"""Rows longer than max_seq_length in pieces (`on_overlong: split`)."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Sequence
from typing import TypeAlias

from pyralis.data.tokenize import Encoded
from pyralis.data.types import Message

Messages: TypeAlias = tuple[Message, ...]


def split_tokens(encoded: Encoded, limit: int) -> list[Encoded]:
    """Pieces of at most `limit` tokens. Each begins with the last token of the one before, as context that is not
    learnt, so that every learnt token is learnt once."""
    ids, labels = encoded.input_ids, encoded.labels
    starts = range(0, len(ids) - 1, limit - 1)
    return [Encoded(ids[at : at + limit], labels[at : at + limit], len(ids[at : at + limit])) for at in starts]


def split_conversation(messages: Sequence[Message], fits: Callable[[Messages], bool]) -> list[Messages]:
    """Conversations of whole rounds, each as long as `fits` allows, behind the system message of the whole.

    A round is what begins with a user message behind an answer. One that does not fit alone stands alone.
    """
    head, rounds = _rounds(messages)
    pieces, start = [], 0
    while start < len(rounds):
        ends = range(start + 2, len(rounds) + 1)
        more = bisect_right(ends, False, key=lambda end: not fits(_joined(head, rounds[start:end])))
        end = start + 1 + more
        pieces.append(_joined(head, rounds[start:end]))
        start = end
    return pieces


def last_rounds(messages: Sequence[Message], fits: Callable[[Messages], bool]) -> Messages:
    """The system message and as many of the last rounds as fit behind it; at least the last one."""
    head, rounds = _rounds(messages)
    starts = range(len(rounds) - 2, -1, -1)
    more = bisect_right(starts, False, key=lambda start: not fits(_joined(head, rounds[start:])))
    return _joined(head, rounds[len(rounds) - 1 - more :])


def _rounds(messages: Sequence[Message]) -> tuple[Messages, list[Messages]]:
    head = tuple(messages[: messages[0].role == "system"])
    rounds: list[list[Message]] = []
    for message in messages[len(head) :]:
        if not rounds or (message.role == "user" and rounds[-1][-1].role == "assistant"):
            rounds.append([])
        rounds[-1].append(message)
    return head, [tuple(one) for one in rounds]


def _joined(head: Messages, rounds: Sequence[Messages]) -> Messages:
    return (*head, *(message for one in rounds for message in one))
