"""Rows -> token ids and labels, with a reason for each row that cannot be learnt."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from pyralis.data.formats import FORMATS, parse_row
from pyralis.data.pack import IGNORED, Ids
from pyralis.data.settings import DataSettings
from pyralis.data.template import ChatTemplate
from pyralis.data.tokenize import (
    Encoded,
    adds_bos,
    encode_conversation,
    encode_conversations,
    encode_preference,
    encode_prompt_completion,
    encode_text,
)
from pyralis.data.types import Conversation, PlainText, Preference, PromptCompletion, Record, Source
from pyralis.errors import DataError, TemplateError

# Why a row is dropped, and counted.
OVERLONG = "longer than max_seq_length"
NO_ANSWER = "no assistant turn"
NO_ROOM = "the answer begins behind max_seq_length"
SAME_ANSWERS = "both answers are the same within max_seq_length"
EMPTY = "empty"

# Noted with a row that is kept.
CONTROL_STRINGS = "messages hold a control string of the template, such as its stop"


@dataclass(frozen=True, slots=True)
class RawRow:
    """A row as it was read, and the name of its format."""

    row: dict[str, Any]
    format: str
    source: Source


@dataclass(frozen=True, slots=True)
class EncodedRow:
    """Token ids and labels of a row, at most max_seq_length long; none if `dropped` says why.

    Of a preference the ids are those of the prompt and both answers, pair_lengths how many of each.
    """

    source: Source
    input_ids: Ids
    labels: Ids
    full_length: int
    dropped: str | None = None
    pair_lengths: tuple[int, int, int] | None = None

    @property
    def length(self) -> int:
        """Of what a model is given at once."""
        if self.pair_lengths is None:
            return len(self.input_ids)
        prompt, chosen, rejected = self.pair_lengths
        return prompt + max(chosen, rejected)


@dataclass(frozen=True, slots=True)
class EncodedChunk:
    rows: list[EncodedRow]
    counts: Counter[str]


@dataclass(frozen=True, slots=True)
class Encoder:
    """Everything a process needs to encode rows."""

    settings: DataSettings
    tokenizer: PreTrainedTokenizerBase
    template: ChatTemplate | None

    def encode(self, raw_rows: Sequence[RawRow]) -> EncodedChunk:
        """Parse and tokenise some rows.

        Raises:
            DataError: a bad row, or an overlong one where the settings say so.
            TemplateError: a conversation that the template refuses; names the row.
        """
        counts: Counter[str] = Counter()
        records = [parse_row(raw.row, raw.format, raw.source, counts) for raw in raw_rows]
        for record in records:
            self._check_task(record)
        conversations = [record for record in records if isinstance(record, Conversation)]
        encoded = iter(self._conversations(conversations, counts))
        rows = []
        for record in records:
            if isinstance(record, Preference):
                rows.append(self._preference(record, counts))
                continue
            ids = next(encoded) if isinstance(record, Conversation) else self._other(record)
            rows.append(self._judge(record, ids))
        return EncodedChunk(rows, counts)

    def _check_task(self, record: Record) -> None:
        task = self.settings.task_type
        if isinstance(record, Preference) != (task == "dpo"):
            raise DataError(
                f"{record.source}: preference rows (chosen, rejected) are for task_type dpo, not {task}."
                if task != "dpo"
                else f"{record.source}: task_type dpo needs preference rows, {FORMATS['preference'].example}."
            )
        if task == "pretrain" and not isinstance(record, PlainText):
            raise DataError(
                f'{record.source}: task_type pretrain needs documents, {{"text": ...}}; this row is a '
                f"{'conversation' if isinstance(record, Conversation) else 'prompt with its completion'}. "
                "Set task_type: sft."
            )

    def _conversations(self, records: Sequence[Conversation], counts: Counter[str]) -> list[Encoded]:
        if not records:
            return []
        template = self._template_for(records[0])
        marks = template.control_strings
        counts[CONTROL_STRINGS] += sum(any(m in t.content for m in marks) for r in records for t in r.messages)
        options: dict[str, Any] = {"max_length": self.settings.max_seq_length, "loss_on": self.settings.loss_on}
        try:
            return encode_conversations([r.messages for r in records], template, self.tokenizer, **options)
        except TemplateError:
            # once more one by one, to name the row
            for record in records:
                try:
                    encode_conversation(record.messages, template, self.tokenizer, **options)
                except TemplateError as error:
                    raise TemplateError(f"{record.source}: {error}") from error
            raise

    def _preference(self, record: Preference, counts: Counter[str]) -> EncodedRow:
        template = self._template_for(record)
        turns = (*record.prompt, *record.chosen, *record.rejected)
        counts[CONTROL_STRINGS] += any(m in t.content for m in template.control_strings for t in turns)
        limit, keep = self.settings.max_seq_length, self.settings.max_prompt_length
        try:
            pair = encode_preference(
                record.prompt, record.chosen, record.rejected, template, self.tokenizer,
                max_length=limit, max_prompt_length=keep,
            )  # fmt: skip
        except (DataError, TemplateError) as error:
            raise type(error)(f"{record.source}: {error}") from error
        parts = (pair.prompt_ids, pair.chosen_ids, pair.rejected_ids)
        reason = self._too_long(record.source, pair.full_length)
        if reason is None and pair.chosen_ids == pair.rejected_ids:
            reason = SAME_ANSWERS
        if reason is not None:
            return _left_out(record.source, pair.full_length, reason)
        ids = np.concatenate([np.asarray(part, np.int32) for part in parts])
        labels = ids.copy()
        labels[: max(len(pair.prompt_ids), 1)] = IGNORED
        lengths = (len(parts[0]), len(parts[1]), len(parts[2]))
        return EncodedRow(record.source, ids, labels, pair.full_length, pair_lengths=lengths)

    def _template_for(self, record: Conversation | Preference) -> ChatTemplate:
        if self.template is None:
            raise DataError(
                f"{record.source}: a conversation needs a chat template; the tokenizer has none. Set template_name."
            )
        return self.template

    def _other(self, record: Record) -> Encoded:
        limit = self.settings.max_seq_length
        if isinstance(record, PromptCompletion):
            encoded = encode_prompt_completion(record.prompt, record.completion, self.tokenizer, max_length=limit)
            if self.settings.loss_on == "everything":
                return _all_learnt(encoded.input_ids, encoded.full_length)
            return encoded
        assert isinstance(record, PlainText)
        if not record.text.strip():
            return Encoded([], [], 0)
        # pack_documents puts the EOS behind documents, and cuts the stream
        stream = self.settings.task_type == "pretrain" and self.settings.packs
        ids = encode_text(record.text, self.tokenizer, add_bos=adds_bos(self.tokenizer), add_eos=not stream)
        return _all_learnt(ids if stream else ids[:limit], len(ids))

    def _judge(self, record: Record, encoded: Encoded) -> EncodedRow:
        length = encoded.full_length
        stream = self.settings.task_type == "pretrain" and self.settings.packs
        reason = None if stream else self._too_long(record.source, length)
        if reason is None and not encoded.supervised and not (stream and encoded.input_ids):
            reason = self._why_nothing(record, length)
        if reason is not None:
            return _left_out(record.source, length, reason)
        ids, labels = (np.asarray(values, np.int32) for values in (encoded.input_ids, encoded.labels))
        labels[0] = IGNORED
        return EncodedRow(record.source, ids, labels, length)

    def _too_long(self, source: Source, length: int) -> str | None:
        """Why a row of so many tokens is left out, as the settings say."""
        limit, overlong = self.settings.max_seq_length, self.settings.overlong
        if length > limit and overlong == "error":
            raise DataError(
                f"{source}: {length} tokens, but max_seq_length is {limit} and overlong is 'error'. "
                "Raise max_seq_length, or set overlong to truncate or drop."
            )
        return OVERLONG if length > limit and overlong == "drop" else None

    def _why_nothing(self, record: Record, length: int) -> str:
        if isinstance(record, Conversation) and not any(m.role == "assistant" for m in record.messages):
            return NO_ANSWER
        return NO_ROOM if length > self.settings.max_seq_length else EMPTY


def _left_out(source: Source, length: int, reason: str) -> EncodedRow:
    nothing = np.empty(0, np.int32)
    return EncodedRow(source, nothing, nothing, length, reason)


def _all_learnt(ids: list[int], full_length: int) -> Encoded:
    return Encoded(ids, [IGNORED, *ids[1:]] if ids else [], full_length)
