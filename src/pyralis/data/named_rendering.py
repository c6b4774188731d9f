"""Renders a named template, and writes the Jinja template that gives the same text."""

from __future__ import annotations

import re
from collections.abc import Sequence
from json import dumps
from typing import Any

from pyralis.data.named_templates import TemplateSpec
from pyralis.data.rendering import ChatTemplate, Rendered, Span, SpansOf
from pyralis.data.types import Message
from pyralis.errors import TemplateError

_MARKER = re.compile(r"<<?[^<>\s]+>>?|\[/?[A-Za-z]+\]")


class NamedTemplate(ChatTemplate):
    """A `TemplateSpec` with its stop text (a tokenizer's EOS where the spec leaves it open) and default system text."""

    def __init__(self, spec: TemplateSpec, *, eos: str | None, system: str | None = None) -> None:
        """`system` replaces the default system text; "" means none.

        Raises:
            TemplateError: the template ends answers with EOS, and the tokenizer has none.
        """
        stop = spec.stop or eos
        if not stop:
            raise TemplateError(
                f"template {spec.name!r} ends each answer with the tokenizer's EOS token, and this tokenizer has none. "
                "Set tokenizer.eos_token, or name another template."
            )
        self._spec = spec
        self._stop = stop
        self._eos = eos
        self._system = system

    @property
    def name(self) -> str:
        return self._spec.name

    @property
    def stop_strings(self) -> tuple[str, ...]:
        return (self._stop,)

    @property
    def default_system(self) -> str:
        """The system text of a conversation that has none."""
        return (self._spec.default_system if self._system is None else self._system).strip()

    @property
    def control_strings(self) -> tuple[str, ...]:
        spec = self._spec
        forms = (spec.bos, spec.between, spec.system, spec.user, spec.header, spec.answer, spec.after)
        found = [marker for form in forms for marker in _MARKER.findall(form)]
        return tuple(dict.fromkeys([*found, self._stop]))

    def settings(self) -> dict[str, Any]:
        return {"name": self.name, "system": self._system, "stop": self._stop}

    def render(
        self, messages: Sequence[Message], *, add_generation_prompt: bool = False, spans: SpansOf = "all"
    ) -> Rendered:
        spec = self._spec
        system, turns = self._split(messages)
        text = spec.bos
        inside = ""
        if system:
            form = _fill(spec.system, system)
            text, inside = (text, form) if spec.system_inside_user else (text + form, "")
        users = 0
        found: list[Span] = []
        for message in turns:
            content = message.content.strip()
            if message.role == "user":
                users += 1
                text += (spec.between if users > 1 else "") + _fill(spec.user, inside + content, users)
                inside = ""
            else:
                start = len(text) + len(spec.header)
                text += spec.header + _fill(spec.answer, content) + self._stop
                found.append(Span(start, len(text), turn=len(found)))
                text += spec.after
        if add_generation_prompt:
            text += spec.header
        wanted = {"all": found, "last": found[-1:], "none": []}[spans]
        return Rendered(text, tuple(wanted))

    def _split(self, messages: Sequence[Message]) -> tuple[str, Sequence[Message]]:
        """The system text, and the messages behind it."""
        if not messages:
            raise TemplateError(f"template {self.name!r} was given a conversation without messages.")
        given = messages[0].role == "system"
        system = messages[0].content.strip() if given else self.default_system
        turns = messages[1:] if given else messages
        for position, message in enumerate(turns, start=int(given)):
            if message.role not in ("user", "assistant"):
                reason = "a system message must be the first" if message.role == "system" else "it has no form for it"
                raise TemplateError(
                    f"template {self.name!r} cannot write message {position} of role {message.role!r}: {reason}. "
                    'Drop or merge that message, or set template_name to "" to use the tokenizer\'s own template.'
                )
        if system and self._spec.system_inside_user and not any(message.role == "user" for message in turns):
            raise TemplateError(
                f"template {self.name!r} puts the system text into the first user message, and there is none."
            )
        return system, turns

    @property
    def jinja(self) -> str:
        spec = self._spec
        user = _expression(spec.user, "inside.text ~ content", "turn.number")
        if spec.system_inside_user:
            system = "{%- set inside.text = " + _expression(spec.system, "system") + " -%}"
        else:
            system = "{{- " + _expression(spec.system, "system") + " -}}"
        refuse = f"template {self.name} has system (first), user and assistant messages only"
        lines = [
            "{%- set system = " + _quote(self.default_system) + " -%}",
            "{%- set inside = namespace(text='') -%}",
            "{%- set turn = namespace(number=0) -%}",
            "{%- if messages[0]['role'] == 'system' -%}",
            "{%- set system = messages[0]['content'] | trim -%}",
            "{%- endif -%}",
            "{{- " + _quote(spec.bos) + " -}}",
            "{%- if system -%}" + system + "{%- endif -%}",
            "{%- for message in messages -%}",
            "{%- set content = message['content'] | trim -%}",
            "{%- if message['role'] == 'user' -%}",
            "{%- if turn.number > 0 -%}{{- " + _quote(spec.between) + " -}}{%- endif -%}" if spec.between else "",
            "{%- set turn.number = turn.number + 1 -%}",
            "{{- " + user + " -}}",
            "{%- set inside.text = '' -%}",
            "{%- elif message['role'] == 'assistant' -%}",
            "{{- " + _expression(spec.header + spec.answer + "{end}", "content", end=self._stop + spec.after) + " -}}",
            "{%- elif not (loop.first and message['role'] == 'system') -%}",
            "{{- raise_exception(" + _quote(refuse) + ") -}}",
            "{%- endif -%}",
            "{%- endfor -%}",
            "{%- if add_generation_prompt -%}{{- " + _quote(spec.header) + " -}}{%- endif -%}" if spec.header else "",
        ]
        return "\n".join(line for line in lines if line) + "\n"


def _fill(form: str, content: str, number: int = 0) -> str:
    """`form` with its `{content}` and `{round}`; braces in the content mean nothing."""
    before, after = form.split("{content}")
    return before.replace("{round}", str(number)) + content + after


def _quote(text: str) -> str:
    """A Jinja string literal."""
    return dumps(text, ensure_ascii=False)


def _expression(form: str, content: str, number: str = "", *, end: str = "") -> str:
    """The Jinja expression that fills `form` as `_fill` does; `{end}` stands for literal text."""
    values = {"{content}": content, "{round}": number, "{end}": _quote(end)}
    parts = re.split(r"(\{content\}|\{round\}|\{end\})", form)
    return " ~ ".join(values.get(part) or _quote(part) for part in parts if part)
