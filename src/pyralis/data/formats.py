"""What a row is: its format, told by its keys, and the Record that it holds."""

from __future__ import annotations

import difflib
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

from pyralis.data.messages import messages_of, optional_text, shown, text_of, type_name, with_system
from pyralis.data.types import Conversation, Message, PlainText, Preference, PromptCompletion, Record, Row, Source
from pyralis.errors import DataError

# What is counted while parsing, and said in the report.
UNANSWERED = "trailing turns without an answer, cut off"
EMPTY_ANSWER = "empty answers"


@dataclass(frozen=True, slots=True)
class Format:
    """A way of writing rows. A row is of the first format in FORMATS all of whose `keys` it has."""

    keys: tuple[str, ...]
    example: str
    parse: Callable[[Row, Source, Counter[str]], Record]


def detect_format(row: Row, source: Source) -> str:
    """The name of the row's format, by its keys.

    Raises:
        DataError: no format fits; says which keys were found and what is known.
    """
    for name, fmt in FORMATS.items():
        if all(row.get(key) is not None for key in fmt.keys):
            return name
    known = sorted({key for fmt in FORMATS.values() for key in fmt.keys})
    short = [key for key in islice(map(str, row), 50) if len(key) < 30]
    near = [
        f"{shown([key])} (for {found[0]}?)"
        for key in short
        if (found := difflib.get_close_matches(key, known, 1, 0.75))
    ]
    hint = f" Nearly right: {', '.join(near)}." if near else ""
    forms = "\n".join(f"  {name}: {fmt.example}" for name, fmt in FORMATS.items())
    raise DataError(f"{source}: the format is not known by its keys, which are: {shown(row)}.{hint} Known are\n{forms}")


def parse_row(row: Row, fmt: str, source: Source, counts: Counter[str] | None = None) -> Record:
    """The record in a row of format `fmt`; keys that the format does not know are ignored.

    What is not an error but worth knowing is added to `counts` (UNANSWERED, EMPTY_ANSWER). Turns after the last
    answer are cut off; a conversation without any answer is returned whole, for the caller to drop.

    Raises:
        DataError: naming the row, the field, what it was and what it must be.
    """
    if fmt not in FORMATS:
        near = difflib.get_close_matches(fmt, FORMATS, n=1)
        hint = f" Did you mean {near[0]}?" if near else ""
        raise DataError(f"data_format {fmt!r} is not known.{hint} Known are {', '.join(FORMATS)}.")
    missing = [key for key in FORMATS[fmt].keys if row.get(key) is None]
    if missing:
        raise DataError(
            f"{source}: this row has no {' and no '.join(map(repr, missing))}, as format {fmt} needs; it has "
            f"{shown(row)}. All rows of a file must be of one format: that of its first row, or `data_format`."
        )
    return FORMATS[fmt].parse(row, source, Counter() if counts is None else counts)


def _conversation(messages: Sequence[Message], source: Source, counts: Counter[str]) -> Conversation:
    answers = [i for i, message in enumerate(messages) if message.role == "assistant"]
    if answers and answers[-1] < len(messages) - 1:
        counts[UNANSWERED] += len(messages) - 1 - answers[-1]
        messages = messages[: answers[-1] + 1]
    counts[EMPTY_ANSWER] += sum(not messages[i].content.strip() for i in answers)
    return Conversation(tuple(messages), source)


def _parse_turns(key: str) -> Callable[[Row, Source, Counter[str]], Conversation]:
    def parse(row: Row, source: Source, counts: Counter[str]) -> Conversation:
        turns = messages_of(row[key], key, source)
        return _conversation(with_system(optional_text(row, "system", source), turns, source), source, counts)

    return parse


def _parse_alpaca(row: Row, source: Source, counts: Counter[str]) -> Conversation:
    """The question is the instruction and, on a line of its own, the input; `history` holds earlier pairs."""
    history = row.get("history") or []
    if not isinstance(history, list):
        raise DataError(f"{source}: history must be a list of [question, answer], found {type_name(history)}.")
    turns = []
    for i, pair in enumerate(history):
        if not isinstance(pair, list) or len(pair) != 2:
            raise DataError(f"{source}: history[{i}] must be [question, answer], found {type_name(pair)}.")
        turns.append(Message("user", text_of(pair[0], f"history[{i}][0]", source)))
        turns.append(Message("assistant", text_of(pair[1], f"history[{i}][1]", source)))
    parts = [text_of(row["instruction"], "instruction", source), optional_text(row, "input", source)]
    turns.append(Message("user", "\n".join(part for part in parts if part)))
    turns.append(Message("assistant", text_of(row["output"], "output", source)))
    return _conversation(with_system(optional_text(row, "system", source), turns, source), source, counts)


def _parse_prompt_completion(row: Row, source: Source, counts: Counter[str]) -> Conversation | PromptCompletion:
    prompt, completion = row["prompt"], row["completion"]
    if isinstance(prompt, list) != isinstance(completion, list):
        raise DataError(
            f"{source}: prompt is {type_name(prompt)} and completion is {type_name(completion)}. "
            "Both must be text, or both lists of messages."
        )
    if isinstance(prompt, list):
        turns = messages_of(prompt, "prompt", source) + messages_of(completion, "completion", source)
        return _conversation(with_system(optional_text(row, "system", source), turns, source), source, counts)
    pair = PromptCompletion(text_of(prompt, "prompt", source), text_of(completion, "completion", source), source)
    counts[EMPTY_ANSWER] += not pair.completion.strip()
    return pair


def _parse_text(row: Row, source: Source, counts: Counter[str]) -> PlainText:
    return PlainText(text_of(row["text"], "text", source), source)


def _parse_preference(row: Row, source: Source, counts: Counter[str]) -> Preference:
    """Two answers to one history: `prompt`, and what the two lists have in common at their beginning. A prompt that
    the lists repeat is not taken twice; one that is text is ignored where the lists begin with a question of their
    own (UltraFeedback's repeats it there)."""
    chosen, rejected = (_answer(row[key], key, source) for key in ("chosen", "rejected"))
    if chosen == rejected:
        raise DataError(f"{source}: chosen and rejected are the same; there is nothing to prefer. Remove the row.")
    history = _history(row, chosen, rejected, source)
    shared = next((i for i, (a, b) in enumerate(zip(chosen, rejected)) if a != b), min(len(chosen), len(rejected)))
    prompt = with_system(optional_text(row, "system", source), [*history, *chosen[:shared]], source)
    if not any(message.role == "user" for message in prompt):
        raise DataError(f"{source}: chosen and rejected do not begin with the same question.")
    ends = {"chosen": chosen[shared:], "rejected": rejected[shared:]}
    for key, end in ends.items():
        if not end or end[0].role != "assistant" or end[-1].role != "assistant":
            raise DataError(
                f"{source}: {key} must be the common history ({len(prompt)} turns) and then an answer of its own, "
                f"from assistant to assistant; there {_describe(end)}."
            )
    counts[EMPTY_ANSWER] += sum(not end[-1].content.strip() for end in ends.values())
    return Preference(prompt, tuple(ends["chosen"]), tuple(ends["rejected"]), source)


def _answer(value: Any, key: str, source: Source) -> list[Message]:
    if isinstance(value, dict):
        value = [value]
    if isinstance(value, str):
        return [Message("assistant", text_of(value, key, source))]
    return messages_of(value, key, source)


def _history(row: Row, chosen: list[Message], rejected: list[Message], source: Source) -> list[Message]:
    prompt = row.get("prompt")
    only_answers = chosen[0].role == rejected[0].role == "assistant"
    if prompt is None and only_answers:
        raise DataError(f"{source}: chosen and rejected hold only answers, and there is no 'prompt' with the question.")
    if isinstance(prompt, list):
        messages = messages_of(prompt, "prompt", source)
        repeated = chosen[: len(messages)] == messages == rejected[: len(messages)]
        return [] if repeated else messages
    return [Message("user", text_of(prompt, "prompt", source))] if only_answers else []


def _describe(messages: Sequence[Message]) -> str:
    return "stand the roles " + ", ".join(message.role for message in messages) if messages else "is nothing behind it"


# The order decides: UltraFeedback's preference rows also have `prompt` and `messages`.
FORMATS: dict[str, Format] = {
    "preference": Format(
        ("chosen", "rejected"), '{"chosen": [{"role": ..., "content": ...}], "rejected": [...]}', _parse_preference
    ),
    "conversation": Format(
        ("conversation",), '{"conversation": [{"human": ..., "assistant": ...}]}', _parse_turns("conversation")
    ),
    "messages": Format(("messages",), '{"messages": [{"role": ..., "content": ...}]}', _parse_turns("messages")),
    "sharegpt": Format(
        ("conversations",), '{"conversations": [{"from": ..., "value": ...}]}', _parse_turns("conversations")
    ),
    "alpaca": Format(("instruction", "output"), '{"instruction": ..., "input": ..., "output": ...}', _parse_alpaca),
    "prompt_completion": Format(
        ("prompt", "completion"), '{"prompt": ..., "completion": ...}', _parse_prompt_completion
    ),
    "text": Format(("text",), '{"text": ...}', _parse_text),
}
ROW_KEYS = frozenset(key for fmt in FORMATS.values() for key in fmt.keys)
LIST_KEYS = frozenset({"conversation", "messages", "conversations", "chosen", "rejected", "history"})
