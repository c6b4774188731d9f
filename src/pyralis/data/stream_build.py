"""Settings -> a stream of pretraining text (`stream.py`), looked into at its beginning."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from itertools import islice
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from pyralis.data.dataset import BuiltData, build_dataset
from pyralis.data.encode import Encoder
from pyralis.data.files import HubDataset
from pyralis.data.groups import source_groups
from pyralis.data.pack import pack_documents
from pyralis.data.progress import OnProgress
from pyralis.data.read import load_hub, read_file, read_hub
from pyralis.data.settings import DataSettings
from pyralis.data.sources import DataSource, raw_rows
from pyralis.data.stream import DocumentStream
from pyralis.data.tally import Tally
from pyralis.errors import DataError

SAMPLE = 200  # rows of each source that are looked at before anything is trained


def build_stream(
    settings: DataSettings, tokenizer: PreTrainedTokenizerBase, *, progress: OnProgress | None = None
) -> BuiltData:
    """The stream as training data, evaluation data as `build_dataset` builds it, and a report on the first SAMPLE rows
    of each source. The digest is of names and sizes: content is not read twice.

    Raises:
        DataError: a file that cannot be used, or no document among the first rows of a source.
    """
    if tokenizer.eos_token_id is None:
        raise DataError("The tokenizer has no EOS token to put between documents; a stream needs one.")
    encoder = Encoder(settings, tokenizer, None)
    groups = [[_open(found, settings) for found in group] for group in source_groups(settings.files, settings)]
    weights = settings.weights or (1.0,) * len(groups)
    evaluation = None
    if settings.eval_files:
        own = replace(settings, files=settings.eval_files, eval_files=(), weights=(), streaming=False)
        evaluation = build_dataset(own, tokenizer, progress=progress)
    tally, documents = Tally(), []
    for group in groups:
        kept = []
        for raw in islice(raw_rows(group, settings, tally), SAMPLE):
            rows = encoder.encode([raw]).rows
            for row in rows:
                tally.add(row)
            kept += [row.input_ids for row in rows if row.dropped is None]
        if not kept:
            raise DataError(f"{_names(group)}: none of the first {SAMPLE} rows is a document that can be learnt from.")
        documents += kept
    packed = list(pack_documents(documents, settings.max_seq_length, tokenizer.eos_token_id))
    tokens = sum(len(row.input_ids) for row in packed)
    report = tally.report(
        [len(document) for document in documents],
        sequences=len(packed), tokens=tokens, supervised_tokens=tokens - len(packed), packed_fill=None,
        warnings=[f"the training data is a stream: these numbers are of the first {SAMPLE} rows of each source"],
        eval_report=None if evaluation is None else evaluation.report,
    )  # fmt: skip
    digest = hashlib.sha256("".join(source.digest for group in groups for source in group).encode()).hexdigest()
    stream = DocumentStream(groups, weights, encoder, buffer_size=settings.buffer_size)
    return BuiltData(stream, None if evaluation is None else evaluation.train, report, False, digest, None)


def _open(found: Path | HubDataset, settings: DataSettings) -> DataSource:
    if isinstance(found, Path):
        return DataSource(str(found), f"{found.name} {found.stat().st_size}", partial(read_file, found))
    hub_cache = None if settings.cache_dir is None else Path(settings.cache_dir).expanduser()
    rows = load_hub(found, split=settings.split, cache_dir=hub_cache)
    return DataSource(f"{found}@{settings.split}", rows._fingerprint, lambda on_bad: read_hub(rows, found), len(rows))


def _names(group: Sequence[DataSource]) -> str:
    return ", ".join(source.name for source in group[:3]) + (" ..." if len(group) > 3 else "")
