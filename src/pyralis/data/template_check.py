"""Whether a chat template is the one that a tokenizer, and so its model, knows."""

from __future__ import annotations

from itertools import takewhile

from transformers import PreTrainedTokenizerBase

from pyralis.data.rendering import ChatTemplate
from pyralis.data.template import resolve_template
from pyralis.data.types import Message
from pyralis.errors import TemplateError

_PROBE = (
    Message("user", "One?"),
    Message("assistant", "Two."),
    Message("user", "Three?"),
    Message("assistant", "Four."),
)
_SYSTEM = Message("system", "Zero.")


def template_notes(template: ChatTemplate, tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """What is odd about the two together, and what to do about it; nothing where all is well.

    - A named template that writes a conversation otherwise than the tokenizer's own one does: a chat model was made
      with that. White space at the end does not count.
    - A stop text of several tokens is learnt and obeyed all the same, but mostly means a template of another model.
    """
    notes = [
        f"{stop!r}, which ends an answer in this template, is {count} tokens of this model's tokenizer: is it the "
        "model's template?"
        for stop in template.stop_strings
        if (count := len(tokenizer.encode(stop, add_special_tokens=False))) > 1
    ]
    difference = _difference(template, tokenizer) if template.name and tokenizer.chat_template else None
    if difference is not None:
        ours, own = difference
        notes.append(
            f"template_name {template.name} writes {ours} where the tokenizer's own chat template writes {own}. A chat "
            'model was made with its own: set template_name to "", unless it is to learn another. A base model takes '
            "either."
        )
    return notes


def _difference(template: ChatTemplate, tokenizer: PreTrainedTokenizerBase) -> tuple[str, str] | None:
    """How a conversation reads from the first difference on, in both; first one with a system message, which both
    templates may write alike although their default ones are not the same."""
    try:
        own = resolve_template("", tokenizer, system=template.settings().get("system"))
        texts = []
        for probe in ((_SYSTEM, *_PROBE), _PROBE):
            pair = [one.render(probe, spans="none").text.rstrip() for one in (template, own)]
            texts.append(pair)
    except TemplateError:  # the tokenizer's own template cannot be trained with, or has no such messages
        return None
    for ours, theirs in texts:
        if ours != theirs:
            same = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(ours, theirs)))
            return _from(ours, same), _from(theirs, same)
    return None


def _from(text: str, place: int) -> str:
    """A few characters before the place and some behind it, as a literal."""
    start = max(place - 12, 0)
    return repr(("..." if start else "") + text[start : place + 24] + ("..." if place + 24 < len(text) else ""))
