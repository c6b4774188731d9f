"""Which chat template a job uses, and how it travels with the result."""

from __future__ import annotations

import json
from collections.abc import Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Final

from transformers import PreTrainedTokenizerBase

from pyralis.data.jinja_template import JinjaTemplate
from pyralis.data.named_rendering import NamedTemplate
from pyralis.data.named_templates import TEMPLATES
from pyralis.data.rendering import ChatTemplate, Rendered, Span
from pyralis.data.types import Message
from pyralis.errors import TemplateError
from pyralis.models.staging import write_text

__all__ = [
    "TEMPLATE_FILE",
    "ChatTemplate",
    "Rendered",
    "Span",
    "control_strings_in",
    "install_template",
    "load_template",
    "resolve_template",
    "save_template",
    "stop_token_ids",
]

TEMPLATE_FILE: Final = "pyralis_template.json"


def resolve_template(
    template_name: str, tokenizer: PreTrainedTokenizerBase, *, system: str | None = None
) -> ChatTemplate:
    """The named template, or the tokenizer's own for the name "".

    `system` is the system text of conversations that have none, in place of the template's default.

    Raises:
        TemplateError: the name is unknown, or "" and the tokenizer has no template.
    """
    if template_name:
        if template_name not in TEMPLATES:
            near = get_close_matches(template_name.lower(), TEMPLATES, n=3, cutoff=0.5)
            hint = f"Did you mean {' or '.join(near)}? " if near else ""
            raise TemplateError(
                f'unknown template_name {template_name!r}. {hint}Use one of: {", ".join(TEMPLATES)}; or "" for the '
                "tokenizer's own chat template."
            )
        return NamedTemplate(TEMPLATES[template_name], eos=tokenizer.eos_token, system=system)
    if not tokenizer.chat_template:
        raise TemplateError(
            "template_name is empty, which means the tokenizer's own chat template, and this tokenizer has none "
            f"(a base model?). Set template_name to one of: {', '.join(TEMPLATES)}."
        )
    try:
        jinja = tokenizer.get_chat_template()
    except ValueError as error:
        raise TemplateError(
            f"the tokenizer has several chat templates and none is the default: {', '.join(tokenizer.chat_template)}. "
            "Set tokenizer.chat_template to the one to use, or set template_name."
        ) from error
    return JinjaTemplate(jinja, tokenizer, system=system)


def install_template(template: ChatTemplate, tokenizer: PreTrainedTokenizerBase) -> None:
    """Makes the template the tokenizer's own, so that it is saved with it and `apply_chat_template` uses it."""
    tokenizer.chat_template = template.jinja


def save_template(template: ChatTemplate, folder: Path) -> None:
    """Writes the template beside a result, for `load_template`."""
    write_text(folder / TEMPLATE_FILE, json.dumps(template.settings(), ensure_ascii=False, indent=2) + "\n")


def load_template(folder: Path, tokenizer: PreTrainedTokenizerBase) -> ChatTemplate:
    """The template that was saved in `folder`, else the tokenizer's own.

    Raises:
        TemplateError: the file cannot be read as a template, or there is none and the tokenizer has none.
    """
    file = folder / TEMPLATE_FILE
    if not file.exists():
        return resolve_template("", tokenizer)
    try:
        settings = json.loads(file.read_text(encoding="utf-8"))
        if settings["name"]:
            stop, system = settings["stop"], settings["system"]
            if not isinstance(stop, str | None) or not isinstance(system, str | None):
                raise TypeError(f"stop and system are {stop!r} and {system!r}, expected texts")
            return NamedTemplate(TEMPLATES[settings["name"]], eos=stop, system=system)
        return JinjaTemplate(settings["jinja"], tokenizer)
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise TemplateError(
            f"{file} does not hold a chat template ({type(error).__name__}: {error}). It was written by another "
            "version or changed since: remove it to use the tokenizer's own template."
        ) from error


def stop_token_ids(template: ChatTemplate, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The tokens that end an answer, for `generate(eos_token_id=...)`: stop texts that are one token, and EOS."""
    ids = [tokenizer.encode(text, add_special_tokens=False) for text in template.stop_strings]
    stops = [one[0] for one in ids if len(one) == 1]
    if tokenizer.eos_token_id is not None:
        stops.append(tokenizer.eos_token_id)
    return list(dict.fromkeys(stops))


def control_strings_in(messages: Sequence[Message], template: ChatTemplate) -> tuple[str, ...]:
    """The template's own markers that stand in the messages' contents.

    Such text is tokenised as it stands, so that the model sees a marker there. What is learnt does not change by it.
    """
    return tuple(text for text in template.control_strings if any(text in message.content for message in messages))
