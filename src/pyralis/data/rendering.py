"""What a chat template is: messages in, text and the characters of it that are learnt out."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

from pyralis.data.types import Message

SpansOf: TypeAlias = Literal["all", "last", "none"]


@dataclass(frozen=True, slots=True)
class Span:
    """Characters [start, end) of a rendered text that are learnt for assistant turn `turn` (0-based).

    They are what the model has to write once the prompt is given: the answer and the stop text that ends it, without
    the newline that a template may put behind the stop.
    """

    start: int
    end: int
    turn: int


@dataclass(frozen=True, slots=True)
class Rendered:
    """A conversation as text, and its learnt spans in order."""

    text: str
    spans: tuple[Span, ...]


class ChatTemplate(ABC):
    """Renders conversations for one model, in training and in chat alike."""

    @property
    @abstractmethod
    def name(self) -> str:
        """The name in a config, or "" for the tokenizer's own template."""

    @property
    @abstractmethod
    def stop_strings(self) -> tuple[str, ...]:
        """The texts at which generation stops."""

    @property
    @abstractmethod
    def jinja(self) -> str:
        """A Jinja chat template with the same output, for `tokenizer.apply_chat_template`."""

    @property
    @abstractmethod
    def control_strings(self) -> tuple[str, ...]:
        """The template's own markers, such as "<|im_start|>": text in a message that looks like them is one of them."""

    @abstractmethod
    def render(
        self, messages: Sequence[Message], *, add_generation_prompt: bool = False, spans: SpansOf = "all"
    ) -> Rendered:
        """The text of `messages`, and the spans of all assistant turns, of the last only, or none.

        With `add_generation_prompt` the text ends where the assistant's next answer begins.

        Raises:
            TemplateError: the template has no form for these messages, or a wanted span cannot be found.
        """

    @abstractmethod
    def settings(self) -> dict[str, Any]:
        """What `save_template` writes and `load_template` needs to make this template again."""
