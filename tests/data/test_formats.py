"""Every format: its row, what it becomes, and what is said of a bad one."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest

from pyralis.data.formats import EMPTY_ANSWER, FORMATS, UNANSWERED, detect_format, parse_row
from pyralis.data.types import Conversation, Message, PlainText, Preference, PromptCompletion, Source
from pyralis.errors import DataError

HERE = Source("rows.jsonl", 3)
SYSTEM, USER, ANSWER = Message("system", "Be brief."), Message("user", "Hi 你好"), Message("assistant", "Hello 😀")
MORE, LAST = Message("user", "And?"), Message("assistant", "That is all.")


def openai(*messages: Message) -> list[dict[str, str]]:
    return [{"role": message.role, "content": message.content} for message in messages]


def sharegpt(*messages: Message) -> list[dict[str, str]]:
    names = {"user": "human", "assistant": "gpt", "system": "system"}
    return [{"from": names[message.role], "value": message.content} for message in messages]


def parse(row: dict[str, Any], counts: Counter[str] | None = None) -> Any:
    return parse_row(row, detect_format(row, HERE), HERE, counts)


PAIRS = [{"human": USER.content, "assistant": ANSWER.content}, {"human": MORE.content, "assistant": LAST.content}]
CONVERSATIONS = {
    "conversation": {"conversation": PAIRS, "system": SYSTEM.content, "category": "ignored"},
    "messages": {"messages": openai(SYSTEM, USER, ANSWER, MORE, LAST), "text": "not looked at"},
    "sharegpt": {"conversations": sharegpt(USER, ANSWER, MORE, LAST), "system": SYSTEM.content},
    "alpaca": {
        "instruction": MORE.content,
        "input": "",
        "output": LAST.content,
        "history": [[USER.content, ANSWER.content]],
        "system": SYSTEM.content,
    },
    "prompt_completion": {"prompt": openai(SYSTEM, USER, ANSWER, MORE), "completion": openai(LAST)},
}


@pytest.mark.parametrize("name", CONVERSATIONS)
def test_each_conversation_format_gives_the_same_turns(name: str) -> None:
    row = CONVERSATIONS[name]
    assert detect_format(row, HERE) == name
    assert parse(row) == Conversation((SYSTEM, USER, ANSWER, MORE, LAST), HERE)


def test_the_other_records() -> None:
    assert parse({"text": "A document."}) == PlainText("A document.", HERE)
    assert parse({"prompt": "1+1=", "completion": "2"}) == PromptCompletion("1+1=", "2", HERE)
    alpaca = {"instruction": "Translate.", "input": "Katze", "output": "cat"}
    assert parse(alpaca) == Conversation((Message("user", "Translate.\nKatze"), Message("assistant", "cat")), HERE)


def test_roles_and_parts_of_openai() -> None:
    row = {
        "messages": [
            {"role": "developer", "content": SYSTEM.content},
            {"role": "user", "content": [{"type": "text", "text": "Hi "}, {"type": "text", "text": "你好"}]},
            {"role": "tool", "content": "17"},
            {"role": "assistant", "content": ANSWER.content},
        ]
    }
    assert parse(row) == Conversation((SYSTEM, USER, Message("tool", "17"), ANSWER), HERE)


def test_null_optional_fields_are_absent_ones() -> None:
    row = {"instruction": "Hi 你好", "input": None, "output": "Hello 😀", "history": None, "system": None}
    assert parse(row) == Conversation((USER, ANSWER), HERE)


def test_unanswered_turns_are_cut_and_empty_answers_counted() -> None:
    counts: Counter[str] = Counter()
    pairs = [*PAIRS, {"human": "Still there?", "assistant": None}]
    assert parse({"conversation": pairs}, counts) == Conversation((USER, ANSWER, MORE, LAST), HERE)
    assert parse({"messages": openai(USER, ANSWER, MORE)}, counts) == Conversation((USER, ANSWER), HERE)
    assert parse({"conversation": [{"human": "Hi", "assistant": " "}]}, counts).messages[1].content == " "
    assert counts == {UNANSWERED: 2, EMPTY_ANSWER: 1}


def test_a_conversation_without_answer_is_returned_whole() -> None:
    assert parse({"messages": openai(SYSTEM, USER)}) == Conversation((SYSTEM, USER), HERE)


PREFERENCE = Preference((USER, ANSWER, MORE), (LAST,), (Message("assistant", "No."),), HERE)
NO = Message("assistant", "No.")


@pytest.mark.parametrize(
    "row",
    [
        {"chosen": openai(USER, ANSWER, MORE, LAST), "rejected": openai(USER, ANSWER, MORE, NO), "prompt": "Hi"},
        {"chosen": sharegpt(USER, ANSWER, MORE, LAST), "rejected": sharegpt(USER, ANSWER, MORE, NO), "messages": []},
        {"prompt": openai(USER, ANSWER, MORE), "chosen": openai(LAST), "rejected": openai(NO)},
        {"prompt": openai(USER, ANSWER, MORE), "chosen": LAST.content, "rejected": NO.content},
        {"prompt": openai(USER, ANSWER), "chosen": openai(MORE, LAST), "rejected": openai(MORE, NO)},
        {
            "prompt": openai(USER, ANSWER, MORE),
            "chosen": openai(USER, ANSWER, MORE, LAST),
            "rejected": openai(USER, ANSWER, MORE, NO),
        },
        {"prompt": openai(USER, ANSWER, MORE), "chosen": openai(LAST)[0], "rejected": openai(NO)[0]},
    ],
)
def test_preference_forms(row: dict[str, Any]) -> None:
    assert detect_format(row, HERE) == "preference"
    assert parse(row) == PREFERENCE


def test_preference_of_strings_with_system() -> None:
    row = {"prompt": USER.content, "chosen": ANSWER.content, "rejected": "No.", "system": SYSTEM.content}
    assert parse(row) == Preference((SYSTEM, USER), (ANSWER,), (NO,), HERE)


def test_preference_of_several_turns_after_the_history() -> None:
    row = {"chosen": openai(USER, ANSWER, MORE, LAST), "rejected": openai(USER, NO)}
    assert parse(row) == Preference((USER,), (ANSWER, MORE, LAST), (NO,), HERE)


BAD = [
    ({"question": "a", "answer": "b"}, "its keys, which are: question, answer"),
    ({"convesation": []}, "convesation (for conversation?)"),
    ({"conversation": "hi"}, "conversation must be a list of turns, found text"),
    ({"conversation": []}, "conversation is an empty list"),
    ({"conversation": ["hi"]}, "conversation[0] must be an object, found text"),
    ({"conversation": [{"question": "hi"}]}, "conversation[0] has the keys question"),
    ({"conversation": [{"human": "hi"}, {"human": "there", "assistant": "x"}]}, "conversation[0] has no 'assistant'"),
    ({"conversation": [{"human": "hi", "assistant": 3}]}, "conversation[0].assistant must be text, found a number"),
    ({"conversation": [{"human": None, "assistant": "x"}]}, "conversation[0].human must be text, found null"),
    ({"conversation": [{"human": "a", "assistant": "x"}, {"assistant": "x"}]}, "conversation[1] has no 'human'"),
    ({"messages": [{"role": "alien", "content": "x"}]}, "messages[0].role is 'alien'"),
    ({"messages": [{"role": "user", "content": "x"}, {"content": "y"}]}, "messages[1].role is null"),
    ({"messages": [{"role": "user", "content": None}]}, "messages[0].content must be text, found null"),
    ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "content[0] is of type 'image_url'"),
    ({"messages": [{"role": "assistant", "content": None, "tool_calls": [{}]}]}, "messages[0] has tool_calls"),
    ({"messages": openai(USER, SYSTEM)}, "turn 2 is a system message"),
    ({"messages": openai(SYSTEM, USER), "system": "Twice."}, "both a 'system' field and a system message"),
    ({"instruction": "a", "output": "b", "history": [["only one"]]}, "history[0] must be [question, answer]"),
    ({"prompt": "text", "completion": openai(ANSWER)}, "prompt is text and completion is a list"),
    ({"text": 7}, "text must be text, found a number"),
    ({"chosen": openai(USER, ANSWER), "rejected": openai(USER, ANSWER)}, "chosen and rejected are the same"),
    ({"chosen": "a", "rejected": "b"}, "there is no 'prompt'"),
    ({"chosen": openai(USER, ANSWER), "rejected": openai(MORE, ANSWER)}, "do not begin with the same question"),
    ({"chosen": openai(USER, ANSWER), "rejected": openai(USER, ANSWER, MORE, LAST)}, "there is nothing behind it"),
    ({"chosen": openai(USER, ANSWER), "rejected": openai(USER, MORE)}, "rejected must be the common history (1 turns)"),
]


@pytest.mark.parametrize(("row", "reason"), BAD, ids=[reason for _, reason in BAD])
def test_a_bad_row_is_told_where_and_why(row: dict[str, Any], reason: str) -> None:
    with pytest.raises(DataError) as caught:
        parse(row)
    assert str(caught.value).startswith("rows.jsonl:3: ")
    assert reason in str(caught.value)


def test_a_row_of_another_format_is_refused() -> None:
    with pytest.raises(DataError, match=r"rows.jsonl:3: this row has no 'conversation', as format conversation needs"):
        parse_row({"text": "x"}, "conversation", HERE)
    with pytest.raises(DataError, match=r"'alpacca' is not known. Did you mean alpaca\?"):
        parse_row({"text": "x"}, "alpacca", HERE)


@pytest.mark.parametrize("name", FORMATS)
def test_a_named_format_is_read_whatever_else_the_row_holds(name: str) -> None:
    everything = {
        **{key: value for row in CONVERSATIONS.values() for key, value in row.items() if key != "system"},
        "text": "A document.",
        "chosen": openai(USER, ANSWER),
        "rejected": openai(USER, NO),
    }
    assert parse_row(everything, name, HERE).source == HERE
