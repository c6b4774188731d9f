"""Rows -> token ids and labels, with a reason for each row that cannot be learnt."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
from transformers import PreTrainedTokenizerBase

from pyralis.data.encoded_row import (
    BAD,
    EMPTY,
    NO_ANSWER,
    NO_ROOM,
    OVERLONG,
    SAME_ANSWERS,
    EncodedChunk,
    EncodedRow,
    RawRow,
    left_out,
)
from pyralis.data.formats import parse_row
from pyralis.data.offsets import tokenise
from pyralis.data.overlong import Messages, last_rounds, split_conversation, split_tokens
from pyralis.data.pack import IGNORED
from pyralis.data.settings import DataSettings
from pyralis.data.task_rows import check_task
from pyralis.data.template import ChatTemplate, stop_token_ids
from pyralis.data.tokenize import (
    Encoded,
    adds_bos,
    encode_conversations,
    encode_preference,
    encode_prompt_completion,
    encode_text,
)
from pyralis.data.types import Conversation, PlainText, Preference, PromptCompletion, Record, Source
from pyralis.errors import DataError, PyralisError, TemplateError

# Noted with rows that are kept.
CONTROL_STRINGS = "messages hold a control string of the template, such as its stop"
NO_STOP = (
    "rows are cut inside their last answer, which is learnt without its stop: raise max_seq_length, or set on_overlong "
    "to split or drop"
)

_UNCUT = 1 << 40


@dataclass(frozen=True)
class Encoder:
    """Everything a process needs to encode rows."""

    settings: DataSettings
    tokenizer: PreTrainedTokenizerBase
    template: ChatTemplate | None

    def encode(self, raw_rows: Sequence[RawRow]) -> EncodedChunk:
        """Parse and tokenise some rows.

        Raises:
            DataError: a bad row, or an overlong one, where the settings say so.
            TemplateError: a conversation that the template refuses, likewise; names the row.
        """
        counts: Counter[str] = Counter()
        parsed = [self._parse(raw, counts) for raw in raw_rows]
        conversations = iter(self._conversations([one for one in parsed if isinstance(one, Conversation)], counts))
        rows: list[EncodedRow] = []
        for record in parsed:
            if isinstance(record, EncodedRow):
                rows.append(record)
                continue
            try:
                encoded = next(conversations) if isinstance(record, Conversation) else None
                rows += [encoded] if isinstance(encoded, EncodedRow) else self._rows(record, encoded, counts)
            except TemplateError as error:
                rows.append(self._bad(record.source, error))
        return EncodedChunk(rows, counts)

    # Bad rows

    def _parse(self, raw: RawRow, counts: Counter[str]) -> Record | EncodedRow:
        if raw.error is not None:
            return self._bad(raw.source, raw.error)
        try:
            record = parse_row(raw.row, raw.format, raw.source, counts)
            check_task(record, self.settings.task_type, has_template=self.template is not None)
            return record
        except DataError as error:
            return self._bad(raw.source, error)

    def _bad(self, source: Source, error: PyralisError) -> EncodedRow:
        """The row left out, where the settings skip bad ones; else the error is raised, with its place."""
        placed = str(error).startswith(str(source))
        if self.settings.on_bad_row == "error":
            raise error if placed else type(error)(f"{source}: {error}") from error
        return left_out(source, 0, BAD, str(error).removeprefix(f"{source}: "))

    # Conversations

    def _conversations(
        self, records: Sequence[Conversation], counts: Counter[str]
    ) -> Sequence[Encoded] | list[Encoded | EncodedRow]:
        """Each encoded, or left out as a bad row."""
        if not records:
            return []
        marks = self._template.control_strings
        counts[CONTROL_STRINGS] += sum(any(m in t.content for m in marks) for r in records for t in r.messages)
        try:
            return self._encoded([record.messages for record in records])
        except TemplateError:
            return [self._encoded_alone(record) for record in records]

    def _encoded(self, conversations: Sequence[Messages]) -> list[Encoded]:
        limit, loss_on = self.settings.max_seq_length, self.settings.loss_on
        return encode_conversations(conversations, self._template, self.tokenizer, max_length=limit, loss_on=loss_on)

    def _encoded_alone(self, record: Conversation) -> Encoded | EncodedRow:
        try:
            return self._encoded([record.messages])[0]
        except TemplateError as error:
            return self._bad(record.source, error)

    @property
    def _template(self) -> ChatTemplate:
        assert self.template is not None, "check_task lets no conversation pass without a template"
        return self.template

    @cached_property
    def _stops(self) -> frozenset[int]:
        return frozenset(stop_token_ids(self._template, self.tokenizer))

    def _ends_with_stop(self, labels: Sequence[int]) -> bool:
        learnt = next((label for label in reversed(labels) if label != IGNORED), None)
        return learnt in self._stops

    # What a record becomes

    def _rows(self, record: Record, encoded: Encoded | None, counts: Counter[str]) -> list[EncodedRow]:
        if isinstance(record, Preference):
            return [self._preference(record, counts)]
        encoded = self._other(record) if encoded is None else encoded
        if self._stream or encoded.full_length <= self.settings.max_seq_length:
            return [self._judged(record, encoded)]
        if self.settings.on_overlong != "split":
            row = self._judged(record, encoded)
            answered = isinstance(record, Conversation) and self.settings.loss_on != "everything"
            counts[NO_STOP] += row.dropped is None and answered and not self._ends_with_stop(encoded.labels)
            return [row]
        pieces = self._pieces(record, encoded)
        return [self._judged(record, piece, continues=i > 0) for i, piece in enumerate(pieces)]

    def _pieces(self, record: Record, encoded: Encoded) -> list[Encoded]:
        if not isinstance(record, Conversation):
            return split_tokens(encoded, self.settings.max_seq_length)

        def fits(messages: Messages) -> bool:
            text = self._template.render(messages, spans="none").text
            return len(tokenise([text], self.tokenizer)[0].ids) <= self.settings.max_seq_length

        if self.settings.loss_on != "last_turn":
            return self._encoded(split_conversation(record.messages, fits))
        (last,) = self._encoded([last_rounds(record.messages, fits)])
        return [replace(last, full_length=encoded.full_length)]

    @property
    def _stream(self) -> bool:
        """Whether documents become one stream: pack_documents puts the EOS behind each, and cuts the stream."""
        return self.settings.task_type == "pretrain" and self.settings.packs

    def _other(self, record: Record) -> Encoded:
        """Cut at max_seq_length, unless it is to be split."""
        limit = _UNCUT if self.settings.on_overlong == "split" else self.settings.max_seq_length
        if isinstance(record, PromptCompletion):
            encoded = encode_prompt_completion(record.prompt, record.completion, self.tokenizer, max_length=limit)
            if self.settings.loss_on == "everything":
                return _all_learnt(encoded.input_ids, encoded.full_length)
            return encoded
        assert isinstance(record, PlainText)
        if not record.text.strip():
            return Encoded([], [], 0)
        ids = encode_text(record.text, self.tokenizer, add_bos=adds_bos(self.tokenizer), add_eos=not self._stream)
        return _all_learnt(ids if self._stream else ids[:limit], len(ids))

    def _preference(self, record: Preference, counts: Counter[str]) -> EncodedRow:
        turns = (*record.prompt, *record.chosen, *record.rejected)
        counts[CONTROL_STRINGS] += any(m in t.content for m in self._template.control_strings for t in turns)
        limit, keep = self.settings.max_seq_length, self.settings.max_prompt_length
        try:
            pair = encode_preference(
                record.prompt, record.chosen, record.rejected, self._template, self.tokenizer,
                max_length=limit, max_prompt_length=keep,
            )  # fmt: skip
        except (DataError, TemplateError) as error:
            return self._bad(record.source, error)
        parts = (pair.prompt_ids, pair.chosen_ids, pair.rejected_ids)
        reason = self._too_long(record.source, pair.full_length)
        if reason is None and pair.chosen_ids == pair.rejected_ids:
            reason = SAME_ANSWERS
        if reason is not None:
            return left_out(record.source, pair.full_length, reason)
        ids = np.concatenate([np.asarray(part, np.int32) for part in parts])
        labels = ids.copy()
        labels[: max(len(pair.prompt_ids), 1)] = IGNORED
        lengths = (len(parts[0]), len(parts[1]), len(parts[2]))
        return EncodedRow(record.source, ids, labels, pair.full_length, pair_lengths=lengths)

    def _judged(self, record: Record, encoded: Encoded, *, continues: bool = False) -> EncodedRow:
        length = encoded.full_length
        reason = None if self._stream else self._too_long(record.source, length)
        if reason is None and not encoded.supervised and not (self._stream and encoded.input_ids):
            reason = self._why_nothing(record, length)
        if reason is not None:
            return left_out(record.source, length, reason, continues=continues)
        ids, labels = (np.asarray(values, np.int32) for values in (encoded.input_ids, encoded.labels))
        labels[0] = IGNORED
        return EncodedRow(record.source, ids, labels, length, continues=continues)

    def _too_long(self, source: Source, length: int) -> str | None:
        """Why a row of so many tokens is left out, as the settings say."""
        limit, what = self.settings.max_seq_length, self.settings.on_overlong
        if length > limit and what == "error":
            raise DataError(
                f"{source}: {length} tokens, but max_seq_length is {limit} and on_overlong is 'error'. "
                "Raise max_seq_length, or set on_overlong to truncate, split or drop."
            )
        return OVERLONG if length > limit and what == "drop" else None

    def _why_nothing(self, record: Record, length: int) -> str:
        if isinstance(record, Conversation) and not any(m.role == "assistant" for m in record.messages):
            return NO_ANSWER
        cut = length >= self.settings.max_seq_length
        return NO_ROOM if cut and not isinstance(record, PlainText) else EMPTY


def _all_learnt(ids: list[int], full_length: int) -> Encoded:
    return Encoded(ids, [IGNORED, *ids[1:]] if ids else [], full_length)
