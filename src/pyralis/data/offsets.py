"""Which tokens of a tokenised text lie in given characters of it.

A token belongs to a span if a character that it stands for, white space at its ends aside, is in the span; a token of
white space, or of nothing (such as the "▁" that SentencePiece puts in front of a word), if it begins there. So the
token " Hello" of an answer "Hello" is learnt, and a marker that swallows the newline behind it is not.

Fast tokenizers tell each token's characters. For the others (Python and SentencePiece classes) an edge at character p
is proven at token k by tokenising the text up to p, or from p on: if that gives the first k tokens of the whole, or all
but the first k, then these stand for that part. Where a token lies across p, the nearest provable places enclose it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedTokenizerBase

from pyralis.data.rendering import Span
from pyralis.errors import TemplateError

_REACH = 256  # characters around an edge in which a slow tokenizer's token boundary is looked for


@dataclass(frozen=True, slots=True)
class Tokenised:
    """A text's token ids, and per token the characters [start, end) it stands for (None: the tokenizer cannot tell)."""

    text: str
    ids: list[int]
    offsets: list[tuple[int, int]] | None


def tokenise(texts: Sequence[str], tokenizer: PreTrainedTokenizerBase) -> list[Tokenised]:
    """Each text tokenised once, as it stands: no special tokens are added.

    Raises:
        TemplateError: the tokens begin with BOS twice.
    """
    options: dict[str, Any] = {"add_special_tokens": False, "return_attention_mask": False, "verbose": False}
    if tokenizer.is_fast:
        options["return_offsets_mapping"] = True
    encoded = tokenizer(list(texts), **options) if texts else {"input_ids": []}
    bos = tokenizer.bos_token_id
    for text, ids in zip(texts, encoded["input_ids"], strict=True):
        if bos is not None and list(ids[:2]) == [bos, bos]:
            raise TemplateError(
                f"the text begins with {tokenizer.bos_token!r} twice: {text[:60]!r}. It must come once: the template "
                "or the tokenizer writes it already. Take it out of the data, or set another template_name."
            )
    offsets = encoded["offset_mapping"] if tokenizer.is_fast and texts else [None] * len(texts)
    return [Tokenised(*one) for one in zip(texts, encoded["input_ids"], offsets, strict=True)]


def tokens_in(spans: Sequence[Span], tokenised: Tokenised, tokenizer: PreTrainedTokenizerBase) -> list[bool]:
    """For each token, whether it belongs to one of the spans, which are in order and do not overlap.

    Raises:
        TemplateError: a slow tokenizer's tokens cannot be matched with the text at a span's edge.
    """
    if tokenised.offsets is not None:
        return _by_offsets(spans, tokenised.text, tokenised.offsets)
    inside = [False] * len(tokenised.ids)
    for span in spans:
        first = _edge(span.start, span, tokenised, tokenizer)
        last = _edge(span.end, span, tokenised, tokenizer)
        inside[first:last] = [True] * (last - first)
    return inside


def _by_offsets(spans: Sequence[Span], text: str, offsets: Sequence[tuple[int, int]]) -> list[bool]:
    inside = []
    upcoming = iter(spans)
    span = next(upcoming, None)
    covered = 0
    for start, end in offsets:
        if start == end:  # of nothing, or white space that the tokenizer left out of its offsets
            start = min(start, covered)
        covered = max(covered, end)
        while span is not None and start >= span.end:
            span = next(upcoming, None)
        if span is None or end < span.start:
            inside.append(False)
        else:
            inside.append(span.start <= start < end <= span.end or _belongs(text, start, end, span))
    return inside


def _belongs(text: str, start: int, end: int, span: Span) -> bool:
    """Whether a token of the characters [start, end) belongs to the span, by the rule at the top of this file."""
    covered = text[start:end]
    first = start + len(covered) - len(covered.lstrip())
    last = start + len(covered.rstrip())
    if first >= last:
        return span.start <= start < span.end
    return first < span.end and last > span.start


def _edge(position: int, span: Span, tokenised: Tokenised, tokenizer: PreTrainedTokenizerBase) -> int:
    """How many tokens come before the span's edge at `position`, a straddling one counted by the rule above."""
    text, ids = tokenised.text, tokenised.ids

    def tokens_before(place: int) -> int | None:
        prefix = tokenizer(text[:place], add_special_tokens=False, verbose=False)["input_ids"]
        if ids[: len(prefix)] == prefix:
            return len(prefix)
        suffix = tokenizer(text[place:], add_special_tokens=False, verbose=False)["input_ids"]
        split = len(ids) - len(suffix)
        return split if ids[split:] == suffix else None

    exact = len(ids) if position == len(text) else tokens_before(position)
    if exact is not None:
        return exact
    floor, ceiling = max(position - _REACH, 0), min(position + _REACH, len(text))
    before = next(((q, k) for q in range(position - 1, floor - 1, -1) if (k := tokens_before(q)) is not None), None)
    after = next(((q, k) for q in range(position + 1, ceiling + 1) if (k := tokens_before(q)) is not None), None)
    if before is None or after is None or after[1] - before[1] > 1:
        raise TemplateError(
            f"the tokens of {type(tokenizer).__name__}, which has no character offsets, cannot be matched with the "
            f"text around {text[max(position - 20, 0) : position + 20]!r}: which of them belong to the answer is "
            "unknown. Use the fast version of this tokenizer (use_fast, a tokenizer.json)."
        )
    straddles = after[1] > before[1] and _belongs(text, before[0], after[0], span)
    return before[1] if straddles == (position == span.start) else after[1]
