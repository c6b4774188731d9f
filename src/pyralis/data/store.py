"""Rows of token ids in Arrow files: written as they come, read by memory mapping."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from datasets import Dataset

from pyralis.data.pack import IGNORED, Ids

# A batch is written when it holds this many tokens: 4 MB a column.
BATCH_TOKENS = 1 << 20

EXAMPLE_COLUMNS = ("input_ids", "labels")
STREAM_COLUMNS = (*EXAMPLE_COLUMNS, "seq_lengths")
PACKED_COLUMNS = (*STREAM_COLUMNS, "position_ids")
# A preference: prompt, chosen and rejected answer one after another, and the lengths of the three.
PAIR_COLUMNS = (*EXAMPLE_COLUMNS, "pair_lengths")


def write_rows(path: Path, columns: tuple[str, ...], rows: Iterable[Mapping[str, Ids]]) -> None:
    """Write rows of int32 arrays, one list column for each of `columns`, and `length`: that of the first column."""
    schema = pa.schema([*((name, pa.list_(pa.int32())) for name in columns), ("length", pa.int32())])
    pending: list[Mapping[str, Ids]] = []
    tokens = 0
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_stream(file, schema) as writer:
        for row in rows:
            pending.append(row)
            tokens += len(row[columns[0]])
            if tokens >= BATCH_TOKENS:
                writer.write_batch(_batch(schema, columns, pending))
                pending, tokens = [], 0
        if pending:
            writer.write_batch(_batch(schema, columns, pending))


def _batch(schema: pa.Schema, columns: tuple[str, ...], rows: list[Mapping[str, Ids]]) -> pa.RecordBatch:
    arrays = []
    for name in columns:
        values = [np.asarray(row[name], np.int32) for row in rows]
        offsets = np.cumsum([0, *map(len, values)], dtype=np.int32)
        arrays.append(pa.ListArray.from_arrays(offsets, np.concatenate(values)))
    lengths = pa.array([len(row[columns[0]]) for row in rows], pa.int32())
    return pa.RecordBatch.from_arrays([*arrays, lengths], schema=schema)


def read_dataset(path: Path) -> Dataset:
    """A memory-mapped dataset whose rows are dictionaries of numpy arrays."""
    return Dataset.from_file(str(path)).with_format("numpy")


def longest_sequence(rows: Dataset) -> int:
    """The most tokens that see each other: of a pair, those of the prompt and the longer answer; of a packed row, which
    gives each part positions of its own, those of a part."""
    if "position_ids" in rows.column_names:
        return max(pc.max(chunk.flatten()).as_py() for chunk in rows.data["seq_lengths"].chunks)
    if "pair_lengths" not in rows.column_names:
        return max(rows.data["length"].to_pylist())
    return max(prompt + max(chosen, rejected) for prompt, chosen, rejected in rows.data["pair_lengths"].to_pylist())


def highest_token(rows: Dataset) -> int:
    """The highest token id in a dataset of `read_dataset`; reads it once, without copying it."""
    return max(pc.max(chunk.flatten()).as_py() for chunk in rows.data["input_ids"].chunks)


class Rows:
    """Rows of a file of `write_rows` by index, as numpy views into the mapped file. columns: those that are read."""

    def __init__(self, path: Path, columns: tuple[str, ...] = EXAMPLE_COLUMNS) -> None:
        self.path = path
        table = pa.ipc.open_stream(pa.memory_map(str(path))).read_all()
        self.lengths: Ids = table["length"].to_numpy()
        self._values = {
            name: [(chunk.values.to_numpy(), chunk.offsets.to_numpy()) for chunk in table[name].chunks]
            for name in columns
        }
        self._starts = np.cumsum([0, *(len(offsets) - 1 for _, offsets in self._values["input_ids"])])

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, index: int) -> dict[str, Ids]:
        """A row, by column."""
        chunk = int(np.searchsorted(self._starts, index, side="right")) - 1
        within = index - self._starts[chunk]
        found = {}
        for name, chunks in self._values.items():
            values, offsets = chunks[chunk]
            found[name] = values[offsets[within] : offsets[within + 1]]
        return found

    def count(self) -> tuple[int, int]:
        """(tokens, tokens with a label)."""
        supervised = sum(int(np.count_nonzero(values != IGNORED)) for values, _ in self._values["labels"])
        return int(self.lengths.sum(dtype=np.int64)), supervised
