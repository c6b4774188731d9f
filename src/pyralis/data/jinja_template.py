"""A tokenizer's own Jinja chat template, with the learnt spans found and proven.

The spans are found by rendering the conversation once more with sentinels around each assistant content. That render
without its sentinels must be the plain one, and each content must stand whole in its span: a template that drops,
changes or repeats an answer is refused, with the reason.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from transformers import PreTrainedTokenizerBase

from pyralis.data.generation_blocks import generation_blocks, learnt_blocks
from pyralis.data.jinja_limits import RENDER_ERRORS, check_jinja, in_time
from pyralis.data.rendering import ChatTemplate, Rendered, Span, SpansOf
from pyralis.data.types import Message
from pyralis.errors import TemplateError

_ADVICE = "Set template_name to a named template, or give the tokenizer a chat template that does."


class JinjaTemplate(ChatTemplate):
    """The Jinja template of a tokenizer, rendered by the tokenizer itself."""

    def __init__(self, jinja: str, tokenizer: PreTrainedTokenizerBase, *, system: str | None = None) -> None:
        """`system` is the system text of conversations that have none, in place of the template's default. Raises
        TemplateError for Jinja that is not valid, or that may take for ever."""
        check_jinja(jinja)
        self._jinja = _with_default_system(jinja, system) if system is not None else jinja
        self._system = system
        self._tokenizer = tokenizer

    @property
    def name(self) -> str:
        return ""

    @property
    def jinja(self) -> str:
        return self._jinja

    @property
    def stop_strings(self) -> tuple[str, ...]:
        return (self._stop,)

    @cached_property
    def control_strings(self) -> tuple[str, ...]:
        return tuple(token for token in self._special_tokens if token in self._jinja or token in self.stop_strings)

    def settings(self) -> dict[str, Any]:
        return {"name": "", "jinja": self._jinja}

    def render(
        self, messages: Sequence[Message], *, add_generation_prompt: bool = False, spans: SpansOf = "all"
    ) -> Rendered:
        text = self._text(messages, add_generation_prompt)
        self._check_others_are_written(messages, text)
        turns = [position for position, message in enumerate(messages) if message.role == "assistant"]
        wanted = {"all": range(len(turns)), "last": range(len(turns))[-1:], "none": range(0)}[spans]
        if not wanted:
            return Rendered(text, ())
        for _ in range(3):  # a template may write the time: again if the clock went on between the renders
            located = self._locate(messages, turns, text, add_generation_prompt)
            if located is not None:
                break
            text = self._text(messages, add_generation_prompt)
        else:
            raise TemplateError(
                "the tokenizer's chat template writes a conversation differently when unprintable marks stand around "
                f"its answers, so what it writes for an answer cannot be found. {_ADVICE}"
            )
        blocks = in_time(lambda: generation_blocks(_as_dicts(messages), self._jinja, self._tokenizer, text))
        found: list[Span] = []
        for turn in wanted:
            start, end = self._answer(messages, turns[turn], turn, text, *located.of(turn))
            stop = self._stop_behind(text, end, turn)
            if blocks is None:
                found.append(Span(start, stop, turn))
            else:
                found += learnt_blocks(blocks, turn, located.floor(turn), end, stop)
        return Rendered(text, tuple(found))

    # Rendering

    def _text(self, messages: Sequence[Message], add_generation_prompt: bool) -> str:
        try:
            text = in_time(
                lambda: self._tokenizer.apply_chat_template(
                    _as_dicts(messages),
                    chat_template=self._jinja,
                    tokenize=False,
                    add_generation_prompt=add_generation_prompt,
                )
            )
        except RENDER_ERRORS as error:
            roles = ", ".join(message.role for message in messages)
            raise TemplateError(
                f"the tokenizer's chat template refuses a conversation of the roles [{roles}]: {error}. "
                "Change the data, or set template_name to a named template that takes such conversations."
            ) from error
        return str(text)

    def _prompt(self, messages: Sequence[Message], add_generation_prompt: bool) -> str | None:
        """The text in front of an answer, or None where the template does not render that alone."""
        try:
            return self._text(messages, add_generation_prompt) if messages else ""
        except TemplateError:
            return None

    def _check_others_are_written(self, messages: Sequence[Message], text: str) -> None:
        """A system or tool message that the template passes over would be lost without a word."""
        others = [message for message in messages if message.role in ("system", "tool")]
        if self._system is not None and messages[0].role != "system":
            others.insert(0, Message("system", self._system))
        for message in others:
            escaped = json.dumps(message.content, ensure_ascii=False)[1:-1]
            if not any(_squeeze(form) in _squeeze(text) for form in (message.content, escaped)):
                raise TemplateError(
                    f"the tokenizer's chat template does not write {message.role} messages: {message.content[:60]!r} "
                    "would be lost. Drop such messages, or set template_name to a named template."
                )

    # Finding the answers

    def _locate(
        self, messages: Sequence[Message], turns: Sequence[int], text: str, add_generation_prompt: bool
    ) -> _Places | None:
        """Where in `text` the content of each assistant turn starts and ends; None if that cannot be proven."""
        base = 0xF0000  # two private characters per turn, none of them in the text
        while re.search(f"[{chr(base)}-{chr(base + 2 * len(turns) - 1)}]", text):
            base += 2 * len(turns)
        sentinels = re.compile(f"[{chr(base)}-{chr(base + 2 * len(turns) - 1)}]")
        for with_start in (True, False):
            marked = list(messages)
            for turn, position in enumerate(turns):
                content = messages[position].content
                core = content.strip()  # the template may strip: the sentinels must not keep it from that
                lead, _, tail = content.partition(core) if core else ("", "", content)
                start, end = chr(base + 2 * turn) if with_start else "", chr(base + 2 * turn + 1)
                marked[position] = Message("assistant", f"{lead}{start}{core}{end}{tail}")
            rendered = self._prompt(marked, add_generation_prompt)
            if rendered is not None and sentinels.sub("", rendered) == text:
                places: list[list[int]] = [[] for _ in range(2 * len(turns))]
                for count, match in enumerate(sentinels.finditer(rendered)):
                    places[ord(match[0]) - base].append(match.start() - count)
                return _Places(tuple(zip(places[0::2], places[1::2], strict=True)))
        return None

    def _answer(
        self, messages: Sequence[Message], position: int, turn: int, text: str, start: int | None, end: int
    ) -> tuple[int, int]:
        """Where the answer's learnt text starts, and where its content ends.

        It starts where the generation prompt of the messages in front of it ends, so that all the model has to write
        is learnt (such as an empty "<think>" block); where the template cannot tell, it starts at the content.
        """
        prompt = self._prompt(messages[:position], True)
        core = _squeeze(messages[position].content)
        if prompt is not None and text.startswith(prompt) and len(prompt) <= (end if start is None else start):
            between = text[len(prompt) : end if start is None else start]
            if prompt.endswith(" ") or (start is not None and between.strip()):
                start = self._start_behind(prompt, self._prompt(messages[:position], False), start, between)
            else:
                start = len(prompt)
        written = "" if start is None else _squeeze(text[start:end])
        if start is None or not written.endswith(core):
            raise TemplateError(
                f"the tokenizer's chat template does not write the whole of assistant answer {turn + 1} (some drop the "
                "thinking of earlier turns, as in chat), so it cannot be learnt there. Split the conversation so that "
                'each such answer is the last, set loss_on to "last_turn", or set template_name to a named template.'
            )
        return start, end

    @staticmethod
    def _start_behind(prompt: str, bare: str | None, start: int | None, between: str) -> int | None:
        """Where the answer starts behind `prompt`, which is `bare` and a generation prompt; `between` it and the
        content at `start` stands what the model writes first."""
        if start is not None and between.strip() and prompt == bare:
            return start
        if bare is None or prompt == bare:
            return len(prompt)
        # A space at the prompt's end goes into the first token of the answer.
        return max(len(prompt.rstrip(" ")), min(len(bare), len(prompt)))

    # The stop text

    @cached_property
    def _special_tokens(self) -> tuple[str, ...]:
        tokens = {*self._tokenizer.get_added_vocab(), *map(str, self._tokenizer.all_special_tokens)}
        return tuple(sorted((token for token in tokens if token.strip()), key=lambda token: (-len(token), token)))

    @cached_property
    def _stop(self) -> str:
        """What the template writes to end an answer, from a conversation of one turn."""
        probe = (Message("user", "Hello"), Message("assistant", "World"))
        text = self._text(probe, False)
        located = self._locate(probe, [1], text, False)
        ending = "" if located is None else text[located.of(0)[1] :].strip()
        if not ending:
            raise TemplateError(
                "the tokenizer's chat template writes nothing behind an assistant's answer: a model trained with it "
                f"would never stop. {_ADVICE}"
            )
        return next((token for token in self._special_tokens if ending.startswith(token)), ending.split("\n")[0])

    def _stop_behind(self, text: str, end: int, turn: int) -> int:
        """Where the stop text behind the content that ends at `end` ends."""
        place = len(text) - len(text[end:].lstrip())
        if text.startswith(self._stop, place):
            return place + len(self._stop)
        raise TemplateError(
            f"the tokenizer's chat template writes {text[end : end + 20]!r} behind assistant answer {turn + 1} of a "
            f"conversation, not its stop text {self._stop!r}: a model trained with it would not stop. {_ADVICE}"
        )


@dataclass(frozen=True, slots=True)
class _Places:
    """Per assistant turn, everywhere in the text that its content starts and ends."""

    turns: tuple[tuple[list[int], list[int]], ...]

    def of(self, turn: int) -> tuple[int | None, int]:
        """Where the content of `turn` starts (None where the template cut that off) and ends."""
        starts, ends = self.turns[turn]
        if len(ends) != 1 or len(starts) > 1:
            times = "drops" if not ends else f"writes {max(len(ends), len(starts))} times"
            raise TemplateError(
                f"the tokenizer's chat template {times} assistant answer {turn + 1} of the conversation, which must "
                f"stand in the text once to be learnt. {_ADVICE}"
            )
        return (starts[0] if starts else None), ends[0]

    def floor(self, turn: int) -> int:
        """Where the contents of the turns in front of `turn` end."""
        return max((end for _, ends in self.turns[:turn] for end in ends), default=0)


def _as_dicts(messages: Sequence[Message]) -> list[dict[str, str]]:
    return [{"role": message.role, "content": message.content} for message in messages]


def _squeeze(text: str) -> str:
    return "".join(text.split())


def _with_default_system(jinja: str, system: str) -> str:
    """`jinja` with a system message put in front of conversations that have none."""
    message = json.dumps({"role": "system", "content": system}, ensure_ascii=False)
    # The line break is the one that trim_blocks removes: the template itself begins a line, as before.
    return (
        "{% if messages and messages[0]['role'] != 'system' %}"
        "{% set messages = [" + message + "] + messages %}{% endif %}\n" + jinja
    )
