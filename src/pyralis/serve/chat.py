"""A conversation with a model: history, streaming answers, and room made when the context is full."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase, StoppingCriteria, StoppingCriteriaList
from transformers.generation.streamers import BaseStreamer

from pyralis.data.template import ChatTemplate, stop_token_ids
from pyralis.data.tokenize import encode_prompt
from pyralis.data.types import Message
from pyralis.errors import ModelError
from pyralis.serve.decode import StreamDecoder


@dataclass(frozen=True, slots=True)
class ChatOptions:
    """How an answer is drawn.

    Attributes:
        temperature: 0 takes the likeliest token each time, so the same question gets the same answer.
        top_p, top_k: sample from the likeliest tokens that together have this probability; from this many (0: all).
        repetition_penalty: above 1 makes tokens that occurred less likely.
        seed: makes a sampled answer the same each time.
    """

    max_new_tokens: int = 512
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    repetition_penalty: float = 1.0
    seed: int | None = None

    def __post_init__(self) -> None:
        rules = (
            ("max_new_tokens", self.max_new_tokens >= 1, "at least 1"),
            ("temperature", self.temperature >= 0, "at least 0"),
            ("top_p", 0 < self.top_p <= 1, "above 0 and at most 1"),
            ("top_k", self.top_k >= 0, "at least 0"),
            ("repetition_penalty", self.repetition_penalty > 0, "above 0"),
        )
        for name, holds, expected in rules:
            if not holds:
                raise ModelError(f"{name} is {getattr(self, name)}; expected {expected}.")

    def generation(self) -> dict[str, Any]:
        """The arguments for `generate`."""
        sampled = self.temperature > 0
        return {
            "max_new_tokens": self.max_new_tokens,
            "do_sample": sampled,
            "temperature": self.temperature if sampled else None,
            "top_p": self.top_p if sampled else None,
            "top_k": self.top_k if sampled else None,
            "repetition_penalty": self.repetition_penalty,
        }


class ChatSession:
    """Turns with one model. `reply` streams; the history holds what was said, an answer cut short included.

    Args:
        system: the system text; None is the template's default.
        notice: is told when old turns are dropped to make room.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: PreTrainedTokenizerBase,
        template: ChatTemplate,
        *,
        system: str | None = None,
        notice: Callable[[str], None] = lambda line: None,
    ) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self.template = template
        self.system = system
        self.turns: list[Message] = []
        self._notice = notice
        self._stop_ids = stop_token_ids(template, tokenizer)

    @property
    def messages(self) -> list[Message]:
        system = [] if self.system is None else [Message("system", self.system)]
        return [*system, *self.turns]

    @property
    def context_length(self) -> int | None:
        """The most tokens the model was made for, or None where it does not say (Bloom)."""
        config = self.model.config
        length = getattr(config, "max_position_embeddings", None) or getattr(config, "n_positions", None)
        return int(length) if length else None

    def reset(self) -> None:
        """Forget the turns; the system text stays."""
        self.turns.clear()

    def reply(self, text: str, options: ChatOptions = ChatOptions()) -> Iterator[str]:
        """Say `text`; the answer comes in pieces, whose concatenation is what the history keeps.

        Closing the iterator stops the generation.

        Raises:
            ModelError: the message alone does not fit into the context.
            TemplateError: the template refuses the conversation.
        """
        self.turns.append(Message("user", text))
        try:
            prompt = self._fitting_prompt(options)
        except Exception:
            self.turns.pop()
            raise
        answer: list[str] = []
        try:
            for piece in self._pieces(prompt, options):
                visible = piece if answer else piece.lstrip()  # the space behind "Assistant:" is no part of it
                if visible:
                    answer.append(visible)
                    yield visible
        finally:
            self.turns.append(Message("assistant", "".join(answer).strip()))

    def _fitting_prompt(self, options: ChatOptions) -> list[int]:
        """The prompt's tokens, the oldest turns dropped until an answer has room."""
        dropped = 0
        while True:
            prompt = encode_prompt(self.messages, self.template, self.tokenizer)
            limit = self.context_length
            # an answer longer than half the context does not push everything else out
            if limit is None or len(prompt) + min(options.max_new_tokens, limit // 2) <= limit:
                break
            if len(self.turns) == 1:
                raise ModelError(f"The message is too long: {len(prompt)} tokens, and the model takes {limit} in all.")
            del self.turns[:2]
            dropped += 1
        if dropped:
            self._notice(f"the context is full: the {dropped} oldest turn(s) were forgotten")
        return prompt

    def _pieces(self, prompt: list[int], options: ChatOptions) -> Iterator[str]:
        single = {stop for stop in self.template.stop_strings if self._is_one_token(stop)}
        decoder = StreamDecoder(self.tokenizer, [stop for stop in self.template.stop_strings if stop not in single])
        run = _Generation(self.model, prompt, self._arguments(prompt, options), options.seed)
        try:
            for token in run:
                if token in self._stop_ids:
                    break
                if piece := decoder.push(token):
                    yield piece
                if decoder.stopped:
                    break
            if piece := decoder.finish():
                yield piece
        finally:
            run.stop()

    def _arguments(self, prompt: list[int], options: ChatOptions) -> dict[str, Any]:
        arguments = options.generation()
        if self.context_length is not None:
            arguments["max_new_tokens"] = min(options.max_new_tokens, self.context_length - len(prompt))
        pad = self.tokenizer.pad_token_id
        return {**arguments, "eos_token_id": self._stop_ids or None, "pad_token_id": pad, "use_cache": True}

    def _is_one_token(self, text: str) -> bool:
        return len(self.tokenizer.encode(text, add_special_tokens=False)) == 1


class _Generation(BaseStreamer, StoppingCriteria):
    """`generate` in a thread of its own; iterating gives its tokens. An error there is raised here."""

    def __init__(self, model: Any, prompt: list[int], arguments: dict[str, Any], seed: int | None) -> None:
        self._tokens: queue.Queue[int | BaseException | None] = queue.Queue()
        self._stopped = threading.Event()
        self._prompt_seen = False
        self._thread = threading.Thread(target=self._run, args=(model, prompt, arguments, seed), daemon=True)
        self._thread.start()

    def __iter__(self) -> Iterator[int]:
        while (token := self._tokens.get()) is not None:
            if isinstance(token, BaseException):
                raise token
            yield token

    def stop(self) -> None:
        """End after the token being computed, and wait for that."""
        self._stopped.set()
        self._thread.join()

    def put(self, value: torch.Tensor) -> None:
        if self._prompt_seen:
            for token in value.flatten().tolist():
                self._tokens.put(token)
        self._prompt_seen = True  # generate hands over the prompt first

    def end(self) -> None:
        self._tokens.put(None)

    def __call__(self, input_ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:  # type: ignore[override]
        return torch.full((input_ids.shape[0],), self._stopped.is_set(), device=input_ids.device)

    def _run(self, model: Any, prompt: list[int], arguments: dict[str, Any], seed: int | None) -> None:
        try:
            if seed is not None:
                torch.manual_seed(seed)
            input_ids = torch.tensor([prompt], device=model.device)
            with torch.inference_mode():
                model.generate(
                    input_ids=input_ids,
                    attention_mask=torch.ones_like(input_ids),
                    streamer=self,
                    stopping_criteria=StoppingCriteriaList([self]),
                    **arguments,
                )
        except BaseException as error:  # handed to the thread that waits for tokens, and raised there
            self._tokens.put(error)
