"""Pretraining text as an endless stream of full rows, read and tokenised while it is trained on.

Sources are gone through again and again, mixed by weight (`mixture.py`). Within a pass a source's rows are shuffled in
blocks of `buffer_size`, by the seed, the pass and the block's number alone. So where a stream stands is told by a few
numbers (`Position`), and one that begins there gives what the whole one would have given: rows before it are read over,
none is tokenised again.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from typing import Any

import numpy as np
from torch.utils.data import IterableDataset, get_worker_info

from pyralis.data.encode import Encoder
from pyralis.data.encoded_row import EncodedRow, RawRow
from pyralis.data.mixture import next_source
from pyralis.data.pack import Ids, closed, text_row
from pyralis.data.sources import DataSource, raw_rows
from pyralis.data.tally import Tally
from pyralis.errors import DataError, ModelError

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Place:
    """Where a source is: the pass over it, from 0, and how many of its rows are behind."""

    turn: int = 0
    rows: int = 0


@dataclass(frozen=True, slots=True)
class Position:
    """Where a stream is.

    Attributes:
        rows: packed rows given so far.
        places, tokens: of each source: what was read, and the tokens that it has given.
        source, offset: the document that the next row begins inside of: whose it is, and how much of it is given. Its
            place is the one before it. None between documents.
    """

    rows: int
    places: tuple[Place, ...]
    tokens: tuple[int, ...]
    source: int | None = None
    offset: int = 0

    @classmethod
    def start(cls, sources: int) -> Position:
        return cls(0, (Place(),) * sources, (0,) * sources)

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> Position:
        places = tuple(Place(**place) for place in value["places"])
        return cls(**{**value, "places": places, "tokens": tuple(value["tokens"])})


class DocumentStream(IterableDataset[dict[str, Any]]):
    """Rows of exactly `max_seq_length` tokens: input_ids, labels, seq_lengths (`pack.py`), without end.

    sources: one group of files, or hub datasets, for each weight. vocabulary: how many embeddings the model has, if it
    is to be seen that no token lies beyond. A stream is read in one process: a loader without workers.

    Raises, while it is read:
        DataError: a bad row where the settings do not skip such, or a source without any document.
        ModelError: a token beyond the vocabulary.
    """

    def __init__(
        self, sources: Sequence[Sequence[DataSource]], weights: Sequence[float], encoder: Encoder, *, buffer_size: int
    ) -> None:
        assert len(sources) == len(weights)
        self.sources, self.weights, self.encoder, self.buffer_size = sources, weights, encoder, buffer_size
        self.vocabulary: int | None = None
        self.seek(Position.start(len(sources)))

    @property
    def row_length(self) -> int:
        """Tokens of each row."""
        return self.encoder.settings.max_seq_length

    def seek(self, position: Position) -> None:
        """Begin there the next time that rows are asked for.

        Raises DataError for a position in other sources.
        """
        if len(position.places) != len(self.sources):
            raise DataError(
                f"the stream was left at a place in {len(position.places)} sources, but train_file has "
                f"{len(self.sources)} now. Put them back, or start anew in another output_dir."
            )
        self.start, self._given = position, deque([position])

    def position_after(self, rows: int) -> Position:
        """Where the stream was when it had given so many rows, since it began. Earlier ones are forgotten then."""
        while self._given[0].rows < rows:
            self._given.popleft()
        assert self._given[0].rows == rows, "a position that was forgotten, or not given yet"
        return self._given[0]

    def __iter__(self) -> Iterator[dict[str, Any]]:
        if get_worker_info() is not None:
            raise DataError("a stream is read in the main process: set dataloader_num_workers to 0.")
        start, eos = self.start, self.encoder.tokenizer.eos_token_id
        self._given = deque([start])
        readers = [_Reader(self, number, place) for number, place in enumerate(start.places)]
        rows, tokens, source, offset = start.rows, list(start.tokens), start.source, start.offset
        document = None if source is None else closed(next(readers[source]), eos)
        parts: list[Ids] = []
        room = self.row_length
        while True:
            if document is None:
                source, offset = next_source(tokens, self.weights), 0
                document = closed(next(readers[source]), eos)
                tokens[source] += len(document)
            parts.append(document[offset : offset + room])
            offset, room = offset + len(parts[-1]), room - len(parts[-1])
            if offset == len(document):
                document = source = None
            if room == 0:
                rows += 1
                places = tuple(r.before if number == source else r.after for number, r in enumerate(readers))
                self._given.append(
                    Position(rows, places, tuple(tokens), source, 0 if source is None else offset)
                )  # fmt: skip
                yield self._row(parts)
                parts, room = [], self.row_length

    def _row(self, parts: list[Ids]) -> dict[str, Any]:
        row = text_row(parts)
        if self.vocabulary is not None and (highest := int(row.input_ids.max())) >= self.vocabulary:
            raise ModelError(
                f"the data holds token {highest}, but the model has only {self.vocabulary} embeddings: the tokenizer "
                "is not this model's."
            )
        return {
            "input_ids": row.input_ids, "labels": row.labels, "seq_lengths": np.array(row.seq_lengths, np.int32),
            "length": len(row.input_ids),
        }  # fmt: skip


class _Reader:
    """A source's documents, one after another, from a place on. before, after: the places around the last one."""

    def __init__(self, stream: DocumentStream, number: int, place: Place) -> None:
        self._stream, self._number = stream, number
        self.before = self.after = place
        self._documents = self._from(place)

    def __next__(self) -> Ids:
        self.before, self.after, document = next(self._documents)
        return document.input_ids

    def _from(self, place: Place) -> Iterator[tuple[Place, Place, EncodedRow]]:
        encoder, turn, behind = self._stream.encoder, place.turn, place.rows
        found = behind > 0
        while True:
            for number, raw in self._rows(turn, behind):
                for row in encoder.encode([raw]).rows:
                    if row.dropped is None:
                        found = True
                        yield Place(turn, number), Place(turn, number + 1), row
            names = ", ".join(source.name for source in self._stream.sources[self._number])
            if not found:
                raise DataError(f"{names}: there is no document in it that anything can be learnt from.")
            turn, behind, found = turn + 1, 0, False
            logger.info("the stream begins %s again (pass %d)", names, turn + 1)

    def _rows(self, turn: int, behind: int) -> Iterator[tuple[int, RawRow]]:
        """The rows of a pass with their numbers in it, the first `behind` of them left out."""
        size, settings = self._stream.buffer_size, self._stream.encoder.settings
        block, inside = divmod(behind, size)
        rows = raw_rows(self._stream.sources[self._number], settings, Tally())
        next(islice(rows, block * size, block * size), None)
        while chunk := list(islice(rows, size)):
            order = np.random.default_rng([settings.seed, self._number, turn, block]).permutation(len(chunk))
            for at in range(inside, len(chunk)):
                yield block * size + at, chunk[order[at]]
            block, inside = block + 1, 0
