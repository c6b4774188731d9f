"""`get_chat_template`: a named chat template made a tokenizer's own, and the EOS that goes with it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from difflib import get_close_matches
from json import dumps
from typing import Any, Final

from transformers import PreTrainedTokenizerBase

from pyralis.api.notice import notice
from pyralis.data.named_rendering import NamedTemplate
from pyralis.data.named_templates import CHATML, TEMPLATES, TemplateSpec
from pyralis.errors import TemplateError

ALPACA_SYSTEM: Final = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request."
)
# Formats that scripts ask for besides those of `data/named_templates.py`.
_MORE: Final[dict[str, TemplateSpec]] = {
    "chatml": replace(CHATML, name="chatml"),
    "alpaca": TemplateSpec(
        name="alpaca",
        user="### Instruction:\n{content}\n\n",
        header="### Response:\n",
        stop=None,
        after="\n\n",
        default_system=ALPACA_SYSTEM,
    ),
    "qwen2.5": replace(
        CHATML,
        name="qwen2.5",
        default_system="You are Qwen, created by Alibaba Cloud. You are a helpful assistant.",
    ),
    "phi-4": TemplateSpec(
        name="phi-4",
        system="<|im_start|>system<|im_sep|>{content}<|im_end|>",
        user="<|im_start|>user<|im_sep|>{content}<|im_end|>",
        header="<|im_start|>assistant<|im_sep|>",
        stop="<|im_end|>",
    ),
}
_ALIASES: Final = {
    "llama": "llama2", "llama-2": "llama2", "llama-3": "llama3", "phi-3": "phi3", "phi-3.5": "phi3", "phi4": "phi-4",
    "qwen-2.5": "qwen2.5", "gemma2": "gemma", "gemma-2": "gemma", "gemma3": "gemma", "gemma-3": "gemma",
}  # fmt: skip
# Formats with parts that only the published template has (dates, tools, thinking): the tokenizer's own is taken.
_OWN: Final = ("llama-3.1", "llama-3.2", "llama-3.3", "llama31", "qwen3", "qwen-3", "qwen3-instruct", "qwen3-thinking")

Mapped = Mapping[str, str]


def get_chat_template(
    tokenizer: PreTrainedTokenizerBase,
    chat_template: str | tuple[str, str] = "chatml",
    mapping: Mapped | None = None,
    map_eos_token: bool = True,
    system_message: str | None = None,
) -> PreTrainedTokenizerBase:
    """Make a chat template the tokenizer's own, so that `apply_chat_template`, saving and chat use it.

    Args:
        chat_template: a name; a Jinja template; or (a Jinja template, the text that ends an answer). "llama-3.1" and
            others whose published form is more than text around messages keep the tokenizer's own template.
        mapping: how the data spells messages: the names of the keys "role" and "content" and of the roles "user",
            "assistant" and "system", as in {"role": "from", "content": "value", "user": "human", "assistant": "gpt"}.
            Messages with role and content are understood as well.
        map_eos_token: let generation stop at the text that ends an answer. Where that is not a token of the vocabulary,
            the tokenizer's EOS takes its place in the template, which needs no new embedding.
        system_message: of conversations that have none; "" means none.

    Returns:
        The same tokenizer, changed.

    Raises:
        TemplateError: an unknown name, or one that means a template which the tokenizer does not have.
    """
    if isinstance(chat_template, tuple):
        jinja, stop = chat_template
    elif "{{" in chat_template or "{%" in chat_template:
        jinja, stop = chat_template, None
    elif chat_template.lower() in _OWN:
        jinja, stop = _own(tokenizer, chat_template), None
    else:
        template = NamedTemplate(
            _fitted(spec_of(chat_template), tokenizer, map_eos_token), eos=tokenizer.eos_token, system=system_message
        )
        jinja, stop = template.jinja, template.stop_strings[0]
        system_message = None
    if system_message is not None:
        notice("system_message has no effect: the template says by itself what a conversation without one begins with")
    if stop and map_eos_token and stop != tokenizer.eos_token:
        _stop_at(tokenizer, stop)
    tokenizer.chat_template = jinja if mapping is None else _reading(mapping) + jinja
    return tokenizer


def spec_of(name: str) -> TemplateSpec:
    """The template of a name, as scripts or as configs spell it."""
    known = TEMPLATES | _MORE
    key = name.lower()
    found = known.get(_ALIASES.get(key, key))
    if found is None:
        names = sorted({*known, *_ALIASES, *_OWN})
        near = get_close_matches(key, names, n=3, cutoff=0.5)
        hint = f"Did you mean {' or '.join(near)}? " if near else ""
        raise TemplateError(
            f"unknown chat_template {name!r}. {hint}Known are {', '.join(names)}; or give a Jinja template."
        )
    return found


def _fitted(spec: TemplateSpec, tokenizer: PreTrainedTokenizerBase, map_eos_token: bool) -> TemplateSpec:
    """The template with BOS and stop text that this tokenizer has."""
    vocabulary = tokenizer.get_vocab()
    if spec.bos and spec.bos not in vocabulary:
        own_bos = str(tokenizer.bos_token or "")
        spec = replace(spec, bos=own_bos, between=spec.between.replace(spec.bos, own_bos))
    stop, eos = spec.stop, tokenizer.eos_token
    if stop is None or stop in vocabulary or eos is None:
        return spec
    if not map_eos_token:
        notice(f"{stop!r}, which ends an answer, is no token of this tokenizer: it is learnt as several")
        return spec
    notice(f"{stop!r} is no token of this tokenizer: {eos!r} stands in its place")
    forms = {name: getattr(spec, name).replace(stop, eos) for name in ("system", "user", "between", "header", "after")}
    return replace(spec, stop=eos, **forms)


def _own(tokenizer: PreTrainedTokenizerBase, name: str) -> str:
    if not tokenizer.chat_template:
        raise TemplateError(
            f"chat_template {name!r} means the template published with the model, and this tokenizer has none (a base "
            "model?). Load the tokenizer of the instruct model, or name another template, such as 'chatml'."
        )
    return str(tokenizer.get_chat_template())


def _stop_at(tokenizer: PreTrainedTokenizerBase, stop: str) -> None:
    if stop in tokenizer.get_vocab():
        tokenizer.eos_token = stop
    else:
        notice(f"{stop!r}, which ends an answer, is no token of this tokenizer: generation stops at EOS alone")


def _reading(mapping: Mapped) -> str:
    """Jinja that brings messages into role and content before the template proper reads them."""
    role, content = (dumps(mapping.get(key, key)) for key in ("role", "content"))
    roles: dict[str, Any] = {mapping[name]: name for name in ("user", "assistant", "system") if name in mapping}
    return (
        "{%- set mapped = namespace(messages=[]) -%}"
        "{%- for message in messages -%}"
        "{%- if " + role + " in message -%}"
        "{%- set name = message[" + role + "] -%}"
        "{%- set message = {'role': " + dumps(roles) + ".get(name, name), 'content': message[" + content + "]} -%}"
        "{%- endif -%}"
        "{%- set mapped.messages = mapped.messages + [message] -%}"
        "{%- endfor -%}"
        "{%- set messages = mapped.messages -%}\n"
    )
