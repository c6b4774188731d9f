"""Lists of turns, however a dataset spells them -> Messages."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import islice
from typing import Any

from pyralis.data.types import Message, Role, Source
from pyralis.errors import DataError

ROLES: dict[str, Role] = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "human": "user",
    "prompter": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "bot": "assistant",
    "model": "assistant",
    "chatgpt": "assistant",
    "function_call": "assistant",
    "tool": "tool",
    "function": "tool",
    "observation": "tool",
}
_TYPE_NAMES = {dict: "an object", list: "a list", str: "text", int: "a number", float: "a number", bool: "true/false"}


def type_name(value: Any) -> str:
    """The type of a JSON value, in words for a message."""
    return "null" if value is None else _TYPE_NAMES.get(type(value), type(value).__name__)


def text_of(value: Any, field: str, source: Source) -> str:
    """The text of a field: a string, or OpenAI's list of parts of type text, joined."""
    if isinstance(value, str):
        return _whole_characters(value, field, source)
    if isinstance(value, list) and value:
        return "".join(_part_text(part, f"{field}[{i}]", source) for i, part in enumerate(value))
    raise DataError(f"{source}: {field} must be text, found {type_name(value)}.")


def _whole_characters(text: str, field: str, source: Source) -> str:
    """JSON can hold half of a surrogate pair ("\\ud83d"), which no tokenizer takes and no file can hold."""
    if text.isascii():
        return text
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise DataError(
            f"{source}: {field} holds half a character, \\u{ord(text[error.start]):04x} at position {error.start}: it "
            "was cut inside a surrogate pair. Write the text anew, or remove the row."
        ) from error
    return text


def shown(names: Iterable[Any]) -> str:
    """Keys of a row as a message may print them: the first 12, unprintable characters escaped, long ones cut."""
    listed = [_printable(str(name)) for name in islice(names, 13)]
    return ", ".join([*listed[:12], "..."] if len(listed) > 12 else listed) or "(none)"


def _printable(text: str) -> str:
    text = text if len(text) <= 60 else text[:57] + "..."
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def _word(value: Any) -> str:
    return f"'{_printable(value)}'" if isinstance(value, str) else type_name(value)


def _part_text(part: Any, field: str, source: Source) -> str:
    if isinstance(part, str):
        return _whole_characters(part, field, source)
    if not isinstance(part, dict):
        raise DataError(f"{source}: {field} must be an object with a type and a text, found {type_name(part)}.")
    kind = part.get("type", "text")
    if kind not in ("text", "input_text", "output_text"):
        raise DataError(
            f"{source}: {field} is of type {_word(kind)}. Only text can be trained on here; remove the row."
        )
    return text_of(part.get("text"), f"{field}.text", source)


def optional_text(row: dict[str, Any], field: str, source: Source) -> str:
    """The text of a field that may be absent, null or empty: then ''."""
    value = row.get(field)
    return "" if value is None else text_of(value, field, source)


def messages_of(value: Any, field: str, source: Source) -> list[Message]:
    """Turns in any of the three spellings, which must not be mixed in one list:

    `{"human", "assistant"}` pairs (Firefly), `{"role", "content"}` (OpenAI), `{"from", "value"}` (ShareGPT).
    """
    if not isinstance(value, list):
        raise DataError(f"{source}: {field} must be a list of turns, found {type_name(value)}.")
    if not value:
        raise DataError(f"{source}: {field} is an empty list; a conversation needs at least one turn.")
    for i, item in enumerate(value):
        if not isinstance(item, dict):
            raise DataError(f"{source}: {field}[{i}] must be an object, found {type_name(item)}.")
    first = value[0]
    if "human" in first or "assistant" in first:
        return _from_pairs(value, field, source)
    if "role" in first:
        return _from_roles(value, "role", "content", field, source)
    if "from" in first:
        return _from_roles(value, "from", "value", field, source)
    raise DataError(
        f"{source}: {field}[0] has the keys {shown(first)}. A turn has human and assistant, or role and content, "
        "or from and value."
    )


def _from_pairs(items: Sequence[dict[str, Any]], field: str, source: Source) -> list[Message]:
    messages = []
    for i, item in enumerate(items):
        where = f"{field}[{i}]"
        if "human" not in item:
            raise DataError(f"{source}: {where} has no 'human'; it has {shown(item)}.")
        messages.append(Message("user", text_of(item["human"], f"{where}.human", source)))
        if item.get("assistant") is not None:
            messages.append(Message("assistant", text_of(item["assistant"], f"{where}.assistant", source)))
        elif i < len(items) - 1:
            raise DataError(f"{source}: {where} has no 'assistant'. Only the last question may be unanswered.")
    return messages


def _from_roles(
    items: Sequence[dict[str, Any]], role_key: str, text_key: str, field: str, source: Source
) -> list[Message]:
    messages = []
    for i, item in enumerate(items):
        where = f"{field}[{i}]"
        role = item.get(role_key)
        if not isinstance(role, str) or role.lower() not in ROLES:
            raise DataError(f"{source}: {where}.{role_key} is {_word(role)}. Known are {', '.join(ROLES)}.")
        if item.get("tool_calls"):
            raise DataError(f"{source}: {where} has tool_calls. Write the call as text into {text_key!r} instead.")
        messages.append(Message(ROLES[role.lower()], text_of(item.get(text_key), f"{where}.{text_key}", source)))
    return messages


def with_system(system: str, messages: Sequence[Message], source: Source) -> tuple[Message, ...]:
    """The messages with the row's `system` text before them; a system message may stand only at the beginning."""
    if system and messages and messages[0].role == "system":
        raise DataError(f"{source}: there is both a 'system' field and a system message. Keep one of them.")
    for i, message in enumerate(messages):
        if message.role == "system" and i > 0:
            raise DataError(f"{source}: turn {i + 1} is a system message; it can only be the first one.")
    return (Message("system", system), *messages) if system else tuple(messages)
