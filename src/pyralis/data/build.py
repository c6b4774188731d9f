"""Sources -> the Arrow files of a run and the report about them: encode, hold out, pack."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from pyralis.data.encode import (
    EMPTY,
    NO_ANSWER,
    NO_ROOM,
    OVERLONG,
    SAME_ANSWERS,
    EncodedRow,
    Encoder,
    RawRow,
)
from pyralis.data.formats import detect_format
from pyralis.data.pack import Ids, PackedRow, bin_pack, pack_documents, pack_examples, position_ids
from pyralis.data.processes import encode_rows
from pyralis.data.report import DataReport, Tally
from pyralis.data.settings import DataSettings
from pyralis.data.store import EXAMPLE_COLUMNS, PACKED_COLUMNS, PAIR_COLUMNS, STREAM_COLUMNS, Rows, write_rows
from pyralis.data.types import Source
from pyralis.errors import DataError

logger = logging.getLogger(__name__)

Progress = Callable[[int], None]

_ADVICE = {
    NO_ANSWER: "Each conversation needs an assistant turn, or there is nothing to learn from it.",
    NO_ROOM: "What stands before the first answer fills the row: raise max_seq_length, or shorten prompts and system.",
    OVERLONG: "Raise max_seq_length, or set overlong: truncate.",
    SAME_ANSWERS: "They differ only behind max_seq_length: raise it, or lower max_prompt_length.",
    EMPTY: "Their texts are empty.",
}


@dataclass(frozen=True, slots=True)
class DataSource:
    """A file or a loaded hub dataset: its name, a digest of its content, and its rows."""

    name: str
    digest: str
    rows: Callable[[], Iterator[tuple[dict[str, Any], Source]]]


@dataclass(frozen=True, slots=True)
class _Written:
    sequences: int
    tokens: int
    supervised_tokens: int
    packed_fill: float | None


def build_files(
    folder: Path,
    train: Sequence[DataSource],
    evaluation: Sequence[DataSource],
    encoder: Encoder,
    progress: Progress | None = None,
) -> DataReport:
    """Write `train.arrow`, and `eval.arrow` if there is evaluation data, into `folder`.

    Raises:
        DataError: a bad row, or none left to train or to evaluate on.
    """
    settings = encoder.settings
    train_tally, eval_tally = Tally(), Tally()
    rows = _encode(folder / "examples.arrow", train, encoder, train_tally, settings.max_samples, progress)
    warnings = _warnings(train, evaluation, train_tally, settings)
    kept = np.arange(len(rows))
    eval_report = None
    if evaluation:
        eval_rows = _encode(folder / "eval_examples.arrow", evaluation, encoder, eval_tally, None, progress)
        eval_report = _report(eval_tally, eval_rows, np.arange(len(eval_rows)), folder / "eval.arrow", encoder)
    elif settings.eval_split:
        kept, held = _hold_out(len(rows), settings)
        formats = ", ".join(sorted(set(train_tally.formats.values())))
        eval_tally.formats, eval_tally.rows["held out of train_file"] = {"held out of train_file": formats}, len(held)
        eval_report = _report(eval_tally, rows, held, folder / "eval.arrow", encoder)
        warnings.append(f"{len(held):,} rows are held out for evaluation (eval_split {settings.eval_split:g})")
    report = _report(train_tally, rows, kept, folder / "train.arrow", encoder, warnings, eval_report)
    for name in ("examples.arrow", "eval_examples.arrow"):
        (folder / name).unlink(missing_ok=True)
    return report


def _encode(
    path: Path,
    sources: Sequence[DataSource],
    encoder: Encoder,
    tally: Tally,
    limit: int | None,
    progress: Progress | None,
) -> Rows:
    """Encode the first `limit` rows of the sources into a file; what is dropped goes to the tally."""
    raw_rows = islice(_raw_rows(sources, encoder.settings.data_format, tally), limit)

    def kept_rows() -> Iterator[dict[str, Any]]:
        done = 0
        for chunk in encode_rows(raw_rows, encoder):
            tally.counts.update(chunk.counts)
            for row in chunk.rows:
                if row.dropped is not None:
                    tally.drop(row.source, row.dropped)
                    continue
                tally.truncated += row.full_length > row.length
                yield _columns(row)
            done += len(chunk.rows)
            if progress is not None:
                progress(done)

    columns = _columns_of(encoder.settings)
    write_rows(path, columns, kept_rows())
    rows = Rows(path, columns)
    if not len(rows):
        raise DataError(_nothing_left(sources, tally))
    return rows


def _columns_of(settings: DataSettings) -> tuple[str, ...]:
    """What is kept of a row that is not packed."""
    return PAIR_COLUMNS if settings.task_type == "dpo" else EXAMPLE_COLUMNS


def _columns(row: EncodedRow) -> dict[str, Any]:
    found: dict[str, Any] = {"input_ids": row.input_ids, "labels": row.labels}
    return found if row.pair_lengths is None else found | {"pair_lengths": row.pair_lengths}


def _raw_rows(sources: Sequence[DataSource], data_format: str, tally: Tally) -> Iterator[RawRow]:
    """Rows with their format: the named one, or that of the first row of each file."""
    for data_source in sources:
        fmt = None if data_format == "auto" else data_format
        for row, source in data_source.rows():
            fmt = fmt or detect_format(row, source)
            if source.file not in tally.formats:
                logger.info("%s: rows are read as %s", source.file, fmt)
            tally.read(source, fmt)
            yield RawRow(row, fmt, source)


def _nothing_left(sources: Sequence[DataSource], tally: Tally) -> str:
    names = ", ".join(source.name for source in sources[:3]) + (" ..." if len(sources) > 3 else "")
    if not tally.rows:
        return f"{names}: there is no row in it."
    reasons = "; ".join(f"{drop.reason}: {drop.rows:,} ({', '.join(drop.examples)})" for drop in tally.drops)
    return (
        f"{names}: nothing can be learnt from any of the {tally.rows.total():,} rows: {reasons}. "
        + _ADVICE[tally.drops[0].reason]
    )


def _warnings(
    train: Sequence[DataSource], evaluation: Sequence[DataSource], tally: Tally, settings: DataSettings
) -> list[str]:
    warnings = []
    if settings.task_type == "sft" and "text" in tally.formats.values():
        warnings.append("rows with only text are learnt whole, as in pretraining (task_type sft)")
    shared = {source.digest for source in train} & {source.digest for source in evaluation}
    if shared:
        names = ", ".join(source.name for source in evaluation if source.digest in shared)
        warnings.append(f"the evaluation data {names} is also training data: its loss says nothing about new text")
    return warnings


def _hold_out(count: int, settings: DataSettings) -> tuple[np.ndarray, np.ndarray]:
    """(indices to train on, indices held out), each in order; which ones depends on the seed only."""
    held_count = max(1, round(count * settings.eval_split))
    if held_count >= count:
        raise DataError(
            f"eval_split {settings.eval_split:g} of {count} rows leaves none to train on. Use an eval_file."
        )
    order = np.random.default_rng(settings.seed).permutation(count)
    return np.sort(order[held_count:]), np.sort(order[:held_count])


def _report(
    tally: Tally,
    rows: Rows,
    indices: np.ndarray,
    path: Path,
    encoder: Encoder,
    warnings: Sequence[str] = (),
    eval_report: DataReport | None = None,
) -> DataReport:
    """Write the chosen rows, packed where the settings say so, and report on them."""
    written = _write(path, rows, indices, encoder)
    return tally.report(
        rows.lengths[indices],
        sequences=written.sequences,
        tokens=written.tokens,
        supervised_tokens=written.supervised_tokens,
        packed_fill=written.packed_fill,
        warnings=warnings,
        eval_report=eval_report,
    )


def _write(path: Path, rows: Rows, indices: np.ndarray, encoder: Encoder) -> _Written:
    settings = encoder.settings
    room = settings.max_seq_length
    if not settings.packs:
        write_rows(path, _columns_of(settings), (rows[i] for i in indices))
    elif settings.task_type == "pretrain":
        documents = (rows[i]["input_ids"] for i in indices)
        stream = pack_documents(documents, room, encoder.tokenizer.eos_token_id)
        write_rows(path, STREAM_COLUMNS, map(_stream_row, stream))
    else:
        bins = bin_pack(rows.lengths[indices].tolist(), room)
        packed = (pack_examples([_example(rows[indices[i]]) for i in members]) for members in bins)
        write_rows(path, PACKED_COLUMNS, map(_packed_row, packed))
    result = Rows(path)
    tokens, supervised = result.count()
    return _Written(len(result), tokens, supervised, tokens / (len(result) * room) if settings.packs else None)


def _example(row: Mapping[str, Ids]) -> tuple[Ids, Ids]:
    return row["input_ids"], row["labels"]


def _stream_row(row: PackedRow) -> dict[str, Any]:
    return {"input_ids": row.input_ids, "labels": row.labels, "seq_lengths": row.seq_lengths}


def _packed_row(row: PackedRow) -> dict[str, Any]:
    return {**_stream_row(row), "position_ids": position_ids(row.seq_lengths)}
