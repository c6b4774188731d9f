"""Rows -> token ids and labels, in one process or several, with a reason for each row that cannot be learnt."""

from __future__ import annotations

import multiprocessing
import os
import sys
from collections import Counter, deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from itertools import chain, islice
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from pyralis.data.formats import parse_row
from pyralis.data.pack import IGNORED, Ids
from pyralis.data.settings import DataSettings
from pyralis.data.template import ChatTemplate
from pyralis.data.tokenize import (
    Encoded,
    adds_bos,
    encode_conversation,
    encode_conversations,
    encode_prompt_completion,
    encode_text,
)
from pyralis.data.types import Conversation, PlainText, Preference, PromptCompletion, Record, Source
from pyralis.errors import DataError, TemplateError

# Why a row is dropped, and counted.
OVERLONG = "longer than max_seq_length"
NO_ANSWER = "no assistant turn"
NO_ROOM = "the answer begins behind max_seq_length"
EMPTY = "empty"

# Noted with a row that is kept.
CONTROL_STRINGS = "messages hold a control string of the template, such as its stop"

CHUNK_ROWS = 256
# Forking two processes takes 0.14 s and sending back a chunk of 1024-token rows 5 ms, against 1.5 s to tokenise it:
# from here on it always pays.
PARALLEL_FROM_ROWS = 2000


@dataclass(frozen=True, slots=True)
class RawRow:
    """A row as it was read, and the name of its format."""

    row: dict[str, Any]
    format: str
    source: Source


@dataclass(frozen=True, slots=True)
class EncodedRow:
    """Token ids and labels of a row, at most max_seq_length long; none if `dropped` says why."""

    source: Source
    input_ids: Ids
    labels: Ids
    full_length: int
    dropped: str | None = None


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
            ids = next(encoded) if isinstance(record, Conversation) else self._other(record)
            rows.append(self._judge(record, ids))
        return EncodedChunk(rows, counts)

    def _check_task(self, record: Record) -> None:
        task = self.settings.task_type
        if isinstance(record, Preference):
            raise DataError(f"{record.source}: preference rows (chosen, rejected) are for task_type dpo, not {task}.")
        if task == "pretrain" and not isinstance(record, PlainText):
            raise DataError(
                f'{record.source}: task_type pretrain needs documents, {{"text": ...}}; this row is a '
                f"{'conversation' if isinstance(record, Conversation) else 'prompt with its completion'}. "
                "Set task_type: sft."
            )

    def _conversations(self, records: Sequence[Conversation], counts: Counter[str]) -> list[Encoded]:
        if not records:
            return []
        if self.template is None:
            raise DataError(
                f"{records[0].source}: a conversation needs a chat template; the tokenizer has none. Set template_name."
            )
        marks = self.template.control_strings
        counts[CONTROL_STRINGS] += sum(any(m in t.content for m in marks) for r in records for t in r.messages)
        options: dict[str, Any] = {"max_length": self.settings.max_seq_length, "loss_on": self.settings.loss_on}
        try:
            return encode_conversations([r.messages for r in records], self.template, self.tokenizer, **options)
        except TemplateError:
            # once more one by one, to name the row
            for record in records:
                try:
                    encode_conversation(record.messages, self.template, self.tokenizer, **options)
                except TemplateError as error:
                    raise TemplateError(f"{record.source}: {error}") from error
            raise

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
        limit, length = self.settings.max_seq_length, encoded.full_length
        stream = self.settings.task_type == "pretrain" and self.settings.packs
        reason = None
        if length > limit and not stream:
            if self.settings.overlong == "error":
                raise DataError(
                    f"{record.source}: {length} tokens, but max_seq_length is {limit} and overlong is 'error'. "
                    "Raise max_seq_length, or set overlong to truncate or drop."
                )
            reason = OVERLONG if self.settings.overlong == "drop" else None
        if reason is None and not encoded.supervised and not (stream and encoded.input_ids):
            reason = self._why_nothing(record, length)
        if reason is not None:
            nothing = np.empty(0, np.int32)
            return EncodedRow(record.source, nothing, nothing, length, reason)
        ids, labels = (np.asarray(values, np.int32) for values in (encoded.input_ids, encoded.labels))
        labels[0] = IGNORED
        return EncodedRow(record.source, ids, labels, length)

    def _why_nothing(self, record: Record, length: int) -> str:
        if isinstance(record, Conversation) and not any(m.role == "assistant" for m in record.messages):
            return NO_ANSWER
        return NO_ROOM if length > self.settings.max_seq_length else EMPTY


def _all_learnt(ids: list[int], full_length: int) -> Encoded:
    return Encoded(ids, [IGNORED, *ids[1:]] if ids else [], full_length)


def encode_rows(rows: Iterable[RawRow], encoder: Encoder) -> Iterator[EncodedChunk]:
    """Chunks in the order of the rows, the same for any number of processes."""
    rows = iter(rows)
    head = list(islice(rows, PARALLEL_FROM_ROWS))
    processes = min(encoder.settings.num_workers, usable_cpus())
    chunks = _in_chunks(chain(head, rows))
    if processes < 2 or len(head) < PARALLEL_FROM_ROWS:
        yield from map(encoder.encode, chunks)
    else:
        yield from _in_processes(chunks, encoder, processes)


def usable_cpus() -> int:
    """CPUs of this process; 1 where processes cannot be forked safely."""
    return len(os.sched_getaffinity(0)) if sys.platform == "linux" else 1


def _in_chunks(rows: Iterator[RawRow]) -> Iterator[list[RawRow]]:
    while chunk := list(islice(rows, CHUNK_ROWS)):
        yield chunk


_encoder: Encoder | None = None


def _start_process(encoder: Encoder) -> None:
    global _encoder
    # a forked process must not use the parent's tokenizer threads
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    _encoder = encoder


def _encode(chunk: list[RawRow]) -> EncodedChunk:
    assert _encoder is not None
    return _encoder.encode(chunk)


def _in_processes(chunks: Iterator[list[RawRow]], encoder: Encoder, processes: int) -> Iterator[EncodedChunk]:
    # fork: nothing is imported or pickled again (a spawned process needs 5-10 s for transformers alone)
    context = multiprocessing.get_context("fork")
    pool = ProcessPoolExecutor(processes, context, initializer=_start_process, initargs=(encoder,))
    running: deque[Future[EncodedChunk]] = deque()
    try:
        for chunk in chunks:
            running.append(pool.submit(_encode, chunk))
            if len(running) > 2 * processes:
                yield running.popleft().result()
        while running:
            yield running.popleft().result()
    except BrokenProcessPool as error:
        raise DataError(
            "A process that tokenised died, probably for want of memory. Set tokenize_num_workers to a smaller number."
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)
