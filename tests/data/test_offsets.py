"""Tokens at the edges of a span, with offsets and without."""

from __future__ import annotations

import pytest
from transformers import ByT5Tokenizer, PreTrainedTokenizerBase

from pyralis.data.offsets import Tokenised, tokenise, tokens_in
from pyralis.data.rendering import Span
from pyralis.errors import TemplateError
from tests.data.tokenizers import SlowBPE, slow_bpe, tiny_tokenizer


def learnt(before: str, span: str, after: str, tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """The tokens of `before + span + after` that belong to the span."""
    (tokenised,) = tokenise([before + span + after], tokenizer)
    inside = tokens_in([Span(len(before), len(before + span), turn=0)], tokenised, tokenizer)
    tokens = tokenizer.convert_ids_to_tokens(tokenised.ids)
    return [token for token, on in zip(tokens, inside, strict=True) if on]


@pytest.mark.parametrize(
    ("kind", "before", "span", "after", "expected"),
    [
        # a space in front of the span is part of its first word's token
        ("byte_level", "A: ", "hello</s>", "", ["Ġhello", "</s>"]),
        ("byte_level_trimmed", "A: ", "hello</s>", "", ["Ġhello", "</s>"]),
        ("llama", "A: ", "hello</s>", "", ["▁hello", "</s>"]),
        ("slow_bpe", "A: ", "hello</s>", "", ["Ġhello", "</s>"]),
        # ... and a token of its own in front of what is no word
        ("byte_level", "A: ", "</s>", "", ["</s>"]),
        ("byte_level_trimmed", "A:", "  </s>", "", ["Ġ", "Ġ", "</s>"]),
        ("byte_level_trimmed", "A:  ", "</s>", "  ", ["</s>"]),
        ("slow_bpe", "A: ", "</s>", " ", ["</s>"]),
        # the prefix that SentencePiece puts behind a control token is the answer's, and not that behind its stop
        ("llama_legacy", "<AI>", "好</s>", "\n", ["▁", "好", "</s>"]),
        ("slow_sentencepiece_bpe", "<AI>", "好</s>", "\n", ["▁", "好", "</s>"]),
        # a control token that swallows white space is not part of what stands behind it
        ("phi", "<|assistant|>\n", " hello<|end|>", "\n<|user|>", ["▁hello", "<|end|>"]),
        ("phi", "<|assistant|>", "\n<|end|>", "\n", ["<|end|>"]),
        # characters of several tokens, characters of one
        ("byte_level", "<AI>", "龘</s>", "龘", ["é", "¾", "ĺ", "</s>"]),
        ("llama", "<AI>", "龘</s>", "龘", ["<0xE9>", "<0xBE>", "<0x98>", "</s>"]),
        ("slow_sentencepiece_unigram", "<AI>", "龘</s>", "龘", ["<0xE9>", "<0xBE>", "<0x98>", "</s>"]),
        ("byte_level_trimmed", "<AI>", "e\u0301</s>", "", ["Ã", "©", "</s>"]),
        ("unigram", "<AI>", "ﬁ</s>", "ﬁ", ["▁f", "i", "</s>"]),
        # white space across an edge belongs where it begins
        ("byte_level", "<AI>", "\n", "\n</s>", ["ĊĊ"]),
        ("byte_level", "<AI>\n", "\n</s>", "", ["</s>"]),
        ("slow_bpe", "<AI>", "\n", "\n</s>", ["ĊĊ"]),
        ("slow_bpe", "<AI>\n", "\n</s>", "", ["</s>"]),
        # a token across the edge of words belongs to both sides
        ("byte_level", "Hel", "lo</s>", "", ["Hello", "</s>"]),
        ("slow_bpe", "Hel", "lo</s>", "", ["Hello", "</s>"]),
        ("slow_bpe", "hello good", " mor", "ning</s>", ["Ġmorning"]),
        ("byte_level", "hello good", " mor", "ning</s>", ["Ġmorning"]),
    ],
)
def test_edges(kind: str, before: str, span: str, after: str, expected: list[str]) -> None:
    tokenizer = tiny_tokenizer(kind)
    if kind == "unigram":  # how a tiny Unigram cuts a word depends on its training
        tokens = learnt(before, span, after, tokenizer)
        assert tokens[-1] == "</s>"
        assert "".join(tokens[:-1]).strip("▁") == "fi"
    else:
        assert learnt(before, span, after, tokenizer) == expected


@pytest.mark.parametrize(
    "text", ["Hello, who are you?", "你好，请问你是谁？", "good  morning\n\n 42", "e\u0301😀龘 <|im_end|>x"]
)
def test_slow_agrees_with_fast_at_every_edge(text: str) -> None:
    fast, slow = tiny_tokenizer("byte_level"), tiny_tokenizer("slow_bpe")
    for start in range(len(text)):
        for end in range(start + 1, len(text) + 1):
            parts = text[:start], text[start:end], text[end:]
            try:
                slowly = learnt(*parts, slow)
            except TemplateError:
                pytest.fail(f"refused: {parts}")
            assert slowly == learnt(*parts, fast), parts


def test_byte_tokenizer() -> None:
    assert learnt("问：", "答</s>", "\n", ByT5Tokenizer()) == [*(chr(byte) for byte in "答".encode()), "</s>"]


class Erratic(SlowBPE):
    """Cuts a text by its length: no beginning of a text gives the beginning of its tokens."""

    def _tokenize(self, text: str, **kwargs: object) -> list[str]:
        tokens = list("abcdefghijklmnopqrstuvwxyz")
        return [tokens[(len(text) + place) % 26] for place in range(len(text))]


def test_unprovable_edges_are_refused() -> None:
    erratic = Erratic(unk_token="<unk>", bos_token="<s>", eos_token="</s>")
    with pytest.raises(TemplateError, match=r"Erratic.*cannot be matched with the text around 'hello good'"):
        learnt("hello", " good", "", erratic)
    assert learnt("Hello", " good", "", slow_bpe()) == ["Ġgood"]


def test_nothing_and_several_spans() -> None:
    assert tokenise([], tiny_tokenizer("byte_level")) == []
    for kind in ("byte_level", "slow_bpe"):
        tokenizer = tiny_tokenizer(kind)
        (empty,) = tokenise([""], tokenizer)
        assert empty.ids == []
        assert tokens_in([], empty, tokenizer) == []
        (text,) = tokenise(["Hello good morning good morning"], tokenizer)
        spans = [Span(0, 5, 0), Span(10, 18, 1), Span(18, 23, 2)]
        assert tokens_in(spans, text, tokenizer) == [True, False, True, True, False]


def test_tokens_of_no_character_belong_where_they_stand() -> None:
    offsets = [(0, 1), (1, 1), (1, 2), (2, 2), (2, 3)]
    inside = tokens_in([Span(1, 2, 0)], Tokenised("abc", [0, 1, 2, 3, 4], offsets), tiny_tokenizer("byte_level"))
    assert inside == [False, True, True, False, False]
