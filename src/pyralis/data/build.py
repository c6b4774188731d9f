"""Sources -> the Arrow files of a run and the report about them: encode, hold out, pack."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from pyralis.data.encode import Encoder
from pyralis.data.examples import columns_of, encode_sources
from pyralis.data.groups import mixed_rows
from pyralis.data.left_out import LEFT_OUT_NAME, LeftOutList
from pyralis.data.pack import Ids, PackedRow, bin_pack, pack_documents, pack_examples, position_ids
from pyralis.data.progress import OnProgress
from pyralis.data.repeats import Repeats, duplicates, shared
from pyralis.data.report import DataReport
from pyralis.data.settings import DataSettings
from pyralis.data.sources import DataSource
from pyralis.data.store import PACKED_COLUMNS, STREAM_COLUMNS, Rows, write_rows
from pyralis.data.tally import Tally
from pyralis.data.template_check import template_notes
from pyralis.errors import DataError


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
    progress: OnProgress | None = None,
) -> DataReport:
    """Write `train.arrow`, and `eval.arrow` if there is evaluation data, into `folder`.

    Raises:
        DataError: a bad row, or none left to train or to evaluate on.
    """
    settings = encoder.settings
    train_tally, eval_tally = Tally(), Tally()
    with LeftOutList(folder / LEFT_OUT_NAME) as list_of_left_out:
        encode = partial(encode_sources, encoder=encoder, progress=progress, listed=list_of_left_out)
        rows = encode(folder / "examples.arrow", train, train_tally, limit=settings.max_samples)
        if evaluation:
            eval_rows = encode(folder / "eval_examples.arrow", evaluation, eval_tally)
    warnings = _warnings(train_tally, encoder)
    kept = np.arange(len(rows))
    eval_report = None
    if evaluation:
        held = np.arange(len(eval_rows))
        common = shared(eval_tally.seen, held, train_tally.seen, kept)
        eval_report = _report(eval_tally, eval_rows, held, folder / "eval.arrow", encoder, shared=common.rows)
    elif settings.eval_split:
        kept, held = _hold_out(len(rows), settings)
        common = shared(train_tally.seen, held, train_tally.seen, kept)
        formats = ", ".join(sorted(set(train_tally.formats.values())))
        eval_tally.formats, eval_tally.rows["held out of train_file"] = {"held out of train_file": formats}, len(held)
        eval_report = _report(eval_tally, rows, held, folder / "eval.arrow", encoder, shared=common.rows)
    if eval_report is not None and common.rows:
        warnings.append(
            f"{common.rows:,} of {len(held):,} evaluation rows are training rows too ({common}): their loss "
            "says nothing about new text. Take them out of one of the two."
        )
    if settings.weights:
        kept, notes = mixed_rows(rows, kept, train_tally.seen, settings)
        warnings += notes
    report = _report(train_tally, rows, kept, folder / "train.arrow", encoder, warnings, eval_report)
    for name in ("examples.arrow", "eval_examples.arrow"):
        (folder / name).unlink(missing_ok=True)
    return report


def _warnings(tally: Tally, encoder: Encoder) -> list[str]:
    formats = set(tally.formats.values())
    warnings = []
    if encoder.settings.task_type == "sft" and "text" in formats:
        warnings.append("rows with only text are learnt whole, as in pretraining (task_type sft)")
    if encoder.template is not None and formats != {"text"}:
        warnings += template_notes(encoder.template, encoder.tokenizer)
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
    shared: int = 0,
) -> DataReport:
    """Write the chosen rows, packed where the settings say so, and report on them."""
    written = _write(path, rows, indices, encoder)
    repeated = duplicates(tally.seen, np.unique(indices)) if len(tally.seen) == len(rows) else Repeats(0, ())
    if repeated.rows:
        notes = f"{repeated.rows:,} rows are the same as an earlier one ({repeated}): they count as often as they come"
        warnings = [*warnings, f"{notes}. Remove them, unless that is meant."]
    return tally.report(
        rows.lengths[indices],
        sequences=written.sequences,
        tokens=written.tokens,
        supervised_tokens=written.supervised_tokens,
        packed_fill=written.packed_fill,
        warnings=warnings,
        duplicates=repeated.rows,
        shared=shared,
        eval_report=eval_report,
    )


def _write(path: Path, rows: Rows, indices: np.ndarray, encoder: Encoder) -> _Written:
    settings = encoder.settings
    room = settings.max_seq_length
    if not settings.packs and np.array_equal(indices, np.arange(len(rows))):
        rows.path.replace(path)  # all of them, as they lie
    elif not settings.packs:
        write_rows(path, columns_of(settings), (rows[i] for i in indices))
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
