"""Rows that come more than once, within the training data and in the evaluation data as well."""

from __future__ import annotations

from array import array
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from pyralis.data.encoded_row import EncodedRow
from pyralis.data.types import Source

EXAMPLES = 3


@dataclass
class Seen:
    """The digests and places of the rows that were kept, 20 bytes a row."""

    files: list[str] = field(default_factory=list)
    _digests: array[int] = field(default_factory=lambda: array("Q"))
    _files: array[int] = field(default_factory=lambda: array("I"))
    _rows: array[int] = field(default_factory=lambda: array("Q"))

    def add(self, row: EncodedRow) -> None:
        if not self.files or self.files[-1] != row.source.file:
            self.files.append(row.source.file)
        self._digests.append(row.digest)
        self._files.append(len(self.files) - 1)
        self._rows.append(row.source.row)

    def __len__(self) -> int:
        return len(self._digests)

    def digests(self) -> NDArray[np.uint64]:
        return np.frombuffer(self._digests, np.uint64) if self._digests else np.empty(0, np.uint64)

    def file_numbers(self) -> NDArray[np.int64]:
        """Of each row, which of `files` it is from."""
        return np.array(self._files, np.int64)

    def source(self, index: int) -> Source:
        return Source(self.files[self._files[index]], self._rows[index])


@dataclass(frozen=True, slots=True)
class Repeats:
    """How many rows are the same as another, and the first few of them, each with that other."""

    rows: int
    examples: tuple[tuple[Source, Source], ...]

    def __str__(self) -> str:
        pairs = ", ".join(f"{one} is {other}" for one, other in self.examples)
        return pairs + (" ..." if self.rows > len(self.examples) else "")


def duplicates(seen: Seen, indices: NDArray[np.int64]) -> Repeats:
    """Of the rows at `indices`, those that are the same as an earlier one."""
    return shared(seen, indices, seen, indices, earlier=True)


def shared(
    rows: Seen,
    indices: NDArray[np.int64],
    others: Seen,
    other_indices: NDArray[np.int64],
    *,
    earlier: bool = False,
) -> Repeats:
    """Of the rows at `indices`, those that are among the others too; `earlier`: before themselves."""
    digests, other_digests = rows.digests()[indices], others.digests()[other_indices]
    known, first = np.unique(other_digests, return_index=True)
    places = np.searchsorted(known, digests).clip(max=max(len(known) - 1, 0))
    found = known[places] == digests if len(known) else np.zeros(len(digests), bool)
    if earlier:
        found &= first[places] < np.arange(len(digests))
    where = np.flatnonzero(found)
    examples = [
        (rows.source(int(indices[i])), others.source(int(other_indices[first[places[i]]]))) for i in where[:EXAMPLES]
    ]
    return Repeats(len(where), tuple(examples))
