"""A row on its way: as it was read, and as token ids and labels or the reason why it is left out."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from hashlib import blake2b

import numpy as np

from pyralis.data.pack import Ids
from pyralis.data.types import Row, Source
from pyralis.errors import PyralisError

# Why a row is left out, and counted.
BAD = "bad row"
OVERLONG = "longer than max_seq_length"
NO_ANSWER = "no assistant turn"
NO_ROOM = "the answer begins behind max_seq_length"
SAME_ANSWERS = "both answers are the same within max_seq_length"
EMPTY = "empty"


@dataclass(frozen=True, slots=True)
class RawRow:
    """A row as it was read, and the name of its format; or why it could not be read."""

    row: Row
    format: str
    source: Source
    error: PyralisError | None = None


@dataclass(frozen=True, slots=True)
class EncodedRow:
    """Token ids and labels of a row, at most max_seq_length long; none if `dropped` says why.

    Attributes:
        input_ids, labels: of a preference those of the prompt and both answers, pair_lengths how many of each.
        full_length: in tokens, before anything was cut; 0 of a bad row.
        detail: what is wrong with a bad row.
        continues: this is a further piece of the row before, which was split.
    """

    source: Source
    input_ids: Ids
    labels: Ids
    full_length: int
    dropped: str | None = None
    detail: str = ""
    pair_lengths: tuple[int, int, int] | None = None
    continues: bool = False

    @property
    def length(self) -> int:
        """Of what a model is given at once."""
        if self.pair_lengths is None:
            return len(self.input_ids)
        prompt, chosen, rejected = self.pair_lengths
        return prompt + max(chosen, rejected)

    @property
    def digest(self) -> int:
        """64 bits of the content's hash: of a million rows two different ones agree with a chance of 3e-8."""
        parts = b"" if self.pair_lengths is None else repr(self.pair_lengths).encode()
        return int.from_bytes(blake2b(self.input_ids.tobytes() + parts, digest_size=8).digest(), "little")


@dataclass(frozen=True, slots=True)
class EncodedChunk:
    rows: list[EncodedRow]
    counts: Counter[str]


def left_out(source: Source, full_length: int, reason: str, detail: str = "", *, continues: bool = False) -> EncodedRow:
    """A row of which nothing is kept."""
    nothing = np.empty(0, np.int32)
    return EncodedRow(source, nothing, nothing, full_length, reason, detail, continues=continues)
