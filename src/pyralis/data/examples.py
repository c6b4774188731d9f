"""Sources -> an Arrow file of examples; data of which too little is left is refused."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from pyralis.data.encode import Encoder
from pyralis.data.encoded_row import BAD, EMPTY, NO_ANSWER, NO_ROOM, OVERLONG, SAME_ANSWERS, EncodedRow
from pyralis.data.left_out import LeftOutList
from pyralis.data.processes import encode_rows
from pyralis.data.progress import OnProgress
from pyralis.data.report import Dropped
from pyralis.data.settings import DataSettings
from pyralis.data.sources import DataSource, raw_rows
from pyralis.data.store import EXAMPLE_COLUMNS, PAIR_COLUMNS, Rows, write_rows
from pyralis.data.tally import Tally
from pyralis.errors import DataError

_ADVICE = {
    NO_ANSWER: "Each conversation needs an assistant turn, or there is nothing to learn from it.",
    NO_ROOM: "What stands before the first answer fills the row: raise max_seq_length, or shorten prompts and system.",
    OVERLONG: "Raise max_seq_length, or set on_overlong: truncate or split.",
    SAME_ANSWERS: "They differ only behind max_seq_length: raise it, or lower max_prompt_length.",
    EMPTY: "Their texts are empty.",
    BAD: "Is data_format, task_type or template_name another than that of these rows?",
}


def encode_sources(
    path: Path,
    sources: Sequence[DataSource],
    tally: Tally,
    *,
    encoder: Encoder,
    progress: OnProgress | None,
    listed: LeftOutList,
    limit: int | None = None,
) -> Rows:
    """Encode the first `limit` rows of the sources into a file; what is left out goes to the tally and is listed."""
    known = [source.about_rows for source in sources]
    about = None if None in known else sum(count for count in known if count is not None)
    total = about if about is None or limit is None else min(about, limit)
    limited = islice(raw_rows(sources, encoder.settings, tally), limit)

    def kept_rows() -> Iterator[dict[str, Any]]:
        done = 0
        for chunk in encode_rows(limited, encoder):
            tally.counts.update(chunk.counts)
            for row in chunk.rows:
                tally.add(row)
                if row.dropped is None:
                    yield _columns(row)
                else:
                    listed.add(row)
            done += len(chunk.rows)
            if progress is not None:
                progress(done, total)

    columns = columns_of(encoder.settings)
    write_rows(path, columns, kept_rows())
    rows = Rows(path, columns)
    if not len(rows):
        raise DataError(_nothing_left(sources, tally))
    _check_lost(sources, tally, encoder.settings)
    return rows


def _check_lost(sources: Sequence[DataSource], tally: Tally, settings: DataSettings) -> None:
    rows, tokens = tally.lost
    if max(rows, tokens) <= settings.max_data_lost:
        return
    what = f"{rows:.1%} of the rows are left out" if rows >= tokens else f"{tokens:.1%} of the tokens are lost"
    reasons = [_reason(drop) for drop in tally.drops]
    if tally.truncated:
        reasons.append(f"cut to max_seq_length {settings.max_seq_length:,}: {tally.truncated:,} rows")
    split = "" if settings.on_overlong == "split" else ", or set on_overlong: split"
    advice = _ADVICE[tally.drops[0].reason] if rows >= tokens else f"Raise max_seq_length{split}."
    raise DataError(
        f"{_names(sources)}: {what}, more than max_data_lost {settings.max_data_lost:g} allows: {'; '.join(reasons)}. "
        f"{advice} Where the loss is meant, raise max_data_lost."
    )


def columns_of(settings: DataSettings) -> tuple[str, ...]:
    """What is kept of a row that is not packed."""
    return PAIR_COLUMNS if settings.task_type == "dpo" else EXAMPLE_COLUMNS


def _columns(row: EncodedRow) -> dict[str, Any]:
    found: dict[str, Any] = {"input_ids": row.input_ids, "labels": row.labels}
    return found if row.pair_lengths is None else found | {"pair_lengths": row.pair_lengths}


def _names(sources: Sequence[DataSource]) -> str:
    return ", ".join(source.name for source in sources[:3]) + (" ..." if len(sources) > 3 else "")


def _reason(drop: Dropped) -> str:
    return f"{drop.reason}: {drop.rows:,} ({', '.join(drop.examples)})"


def _nothing_left(sources: Sequence[DataSource], tally: Tally) -> str:
    if not tally.rows:
        return f"{_names(sources)}: there is no row in it."
    reasons = "; ".join(map(_reason, tally.drops))
    return (
        f"{_names(sources)}: nothing can be learnt from any of the {tally.rows.total():,} rows: {reasons}. "
        + _ADVICE[tally.drops[0].reason]
    )
