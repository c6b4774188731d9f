"""`{% generation %}` blocks: what a chat template's author wants learnt."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase
from transformers.utils.chat_template_utils import render_jinja_template

from pyralis.data.rendering import Span
from pyralis.errors import TemplateError

_GENERATION = re.compile(r"\{%[-+]?\s*generation\s*[-+]?%\}")


def generation_blocks(
    messages: list[dict[str, str]], jinja: str, tokenizer: PreTrainedTokenizerBase, text: str
) -> list[tuple[int, int]] | None:
    """The characters [start, end) of `text`, the rendered `messages`, that stand inside blocks; None without blocks."""
    if not _GENERATION.search(jinja):
        return None
    variables: dict[str, Any] = dict(tokenizer.special_tokens_map)
    result: Any = render_jinja_template(
        conversations=[messages], chat_template=jinja, return_assistant_tokens_mask=True, **variables
    )
    (rendered,), (blocks,) = result
    if not text.startswith(rendered):  # `text` may end with a generation prompt
        raise TemplateError(
            "the tokenizer's chat template has {% generation %} blocks and does not write the same on each render, "
            "so they cannot be placed. Set template_name to a named template."
        )
    return [(start, end) for start, end in blocks if start < end]


def learnt_blocks(blocks: Sequence[tuple[int, int]], turn: int, floor: int, end: int, stop: int) -> list[Span]:
    """The spans of one turn: its blocks (none: its author does not want it learnt), and the stop text with them.

    `floor` and `end` are where the previous turn's content and this one's end, `stop` where its stop text does.
    """
    mine = [(first, last) for first, last in blocks if floor <= first < end]
    if mine and mine[-1][1] < end:
        raise TemplateError(
            f"the {{% generation %}} blocks of the tokenizer's chat template cut assistant answer {turn + 1} off. "
            "Set template_name to a named template."
        )
    return [Span(first, max(last, stop) if (first, last) == mine[-1] else last, turn) for first, last in mine]
