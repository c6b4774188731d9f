"""Pieces of a stream join to the decoded whole, and no piece ends inside a character."""

from __future__ import annotations

import pytest

from pyralis.serve.decode import StreamDecoder
from tests.tiny import make_tiny_tokenizer

TEXTS = [
    "Hello, world",
    "你好，世界。很高兴认识你",
    "🙂👩‍👩‍👧‍👦 e\u0301 ñ",
    "  two\n\n\tspaces ",
    "混合 mixed 🀄 text",
    "",
]


def stream(text: str, stops: tuple[str, ...] = ()) -> tuple[list[str], StreamDecoder]:
    tokenizer = make_tiny_tokenizer()  # one token a byte: every character beyond ASCII spans several
    decoder = StreamDecoder(tokenizer, stops)
    pieces = [decoder.push(token) for token in tokenizer.encode(text, add_special_tokens=False)]
    return [*pieces, decoder.finish()], decoder


@pytest.mark.parametrize("text", TEXTS)
def test_pieces_join_to_the_text(text: str) -> None:
    pieces, decoder = stream(text)
    assert "".join(pieces) == text
    assert not any("\ufffd" in piece for piece in pieces)
    assert not decoder.stopped


def test_broken_utf8_is_not_waited_for_for_ever() -> None:
    tokenizer = make_tiny_tokenizer()
    decoder = StreamDecoder(tokenizer)
    lead = tokenizer.encode("你", add_special_tokens=False)[0]
    pieces = [decoder.push(lead) for _ in range(8)]
    assert any(pieces)
    rest = [decoder.push(token) for token in tokenizer.encode("ok", add_special_tokens=False)]
    assert "".join([*rest, decoder.finish()]).endswith("ok")


def test_special_tokens_are_no_text() -> None:
    assert "".join(stream("a<|im_end|>b")[0]) == "ab"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("done</s>more", "done"),
        ("a < b </ c </s", "a < b </ c </s"),
        ("x</</s>y", "x</"),
        ("</s>", ""),
        ("你好###\n再见", "你好"),
    ],
)
def test_a_stop_text_and_what_follows_are_never_shown(text: str, expected: str) -> None:
    pieces, decoder = stream(text, ("</s>", "###\n"))
    assert "".join(pieces) == expected
    assert decoder.stopped == (expected != text)
