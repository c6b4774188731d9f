"""The data of a run: files -> token ids and labels, checked, packed where asked, cached by content."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import pyarrow as pa
from datasets import Dataset
from pydantic import TypeAdapter
from transformers import PreTrainedTokenizerBase

from pyralis.data.build import build_files
from pyralis.data.cache import REPORT_NAME, build_once, cache_key, cache_root, file_digest
from pyralis.data.encode import Encoder
from pyralis.data.files import HubDataset, resolve_files
from pyralis.data.groups import source_groups
from pyralis.data.left_out import LEFT_OUT_NAME
from pyralis.data.progress import OnProgress, about_rows
from pyralis.data.read import load_hub, read_file, read_hub
from pyralis.data.report import DataReport
from pyralis.data.settings import DataSettings, TaskType
from pyralis.data.sources import DataSource
from pyralis.data.store import read_dataset
from pyralis.data.stream import DocumentStream
from pyralis.data.template import ChatTemplate, resolve_template
from pyralis.errors import DataError

__all__ = ["BuiltData", "DataReport", "DataSettings", "build_dataset", "template_for"]

logger = logging.getLogger(__name__)
_REPORT = TypeAdapter(DataReport)


@dataclass(frozen=True, slots=True)
class BuiltData:
    """Datasets with the columns input_ids, labels, length; packed ones also seq_lengths (the lengths of the parts of
    each row), and where the parts must not attend to one another position_ids; preferences pair_lengths
    (`store.PAIR_COLUMNS`). `digest` is of the content of the training files; `left_out` is the list of the rows that
    were left out (`left_out.LeftOutList`), None where there are none."""

    train: Dataset | DocumentStream
    eval: Dataset | None
    report: DataReport
    from_cache: bool
    digest: str
    left_out: Path | None

    @property
    def is_stream(self) -> bool:
        """Whether `train` is a stream (`stream.DocumentStream`), which has no length."""
        return not isinstance(self.train, Dataset)


def build_dataset(
    settings: DataSettings,
    tokenizer: PreTrainedTokenizerBase,
    template: ChatTemplate | None = None,
    *,
    progress: OnProgress | None = None,
) -> BuiltData:
    """Read, check, tokenise and pack all data of a run, or find it in the cache.

    Args:
        template: for conversations; documents need none.
        progress: told now and then how far it is.

    Raises:
        DataError: a file or row that cannot be used, or no row that anything can be learnt from.
        TemplateError: a conversation that the template refuses.
    """
    if settings.task_type == "pretrain" and settings.packs and tokenizer.eos_token_id is None:
        raise DataError("The tokenizer has no EOS token to put between documents. Set packing: false.")
    train = _open(settings.files, settings)
    evaluation = _open(settings.eval_files, settings) if settings.eval_files else []
    contents = [(source.name, source.digest) for source in train]
    if settings.weights:
        contents += [(f"group {n}", str(len(group))) for n, group in enumerate(source_groups(settings.files, settings))]
    digest = hashlib.sha256("".join(source.digest for source in train).encode()).hexdigest()
    contents += [("eval", ""), *((source.name, source.digest) for source in evaluation)]
    root = cache_root(settings.cache_dir)
    folder = root / cache_key(settings, contents, tokenizer, template)
    encoder = Encoder(settings, tokenizer, template)

    def build(staging: Path) -> None:
        report = build_files(staging, train, evaluation, encoder, progress)
        (staging / REPORT_NAME).write_bytes(_REPORT.dump_json(report, indent=1))

    built = build_once(folder, build)
    try:
        return _load(folder, not built, digest)
    except (OSError, ValueError, pa.ArrowException) as error:
        logger.warning("The cached dataset %s is damaged (%s); it is built again.", folder, error)
        (folder / REPORT_NAME).unlink(missing_ok=True)
        build_once(folder, build)
        return _load(folder, False, digest)


def template_for(
    task_type: TaskType, template_name: str, tokenizer: PreTrainedTokenizerBase, *, system: str | None = None
) -> ChatTemplate | None:
    """The chat template of a job. None for pretraining, and for a tokenizer without one where none is named: data
    without conversations needs none, and a conversation is then refused with its place.

    Raises:
        TemplateError: an unknown name, or a template of the tokenizer that cannot be trained with.
    """
    if task_type == "pretrain" or not (template_name or tokenizer.chat_template):
        return None
    return resolve_template(template_name, tokenizer, system=system)


def _load(folder: Path, from_cache: bool, digest: str) -> BuiltData:
    report = _REPORT.validate_json((folder / REPORT_NAME).read_bytes())
    train = read_dataset(folder / "train.arrow")
    evaluation = None if report.eval is None else read_dataset(folder / "eval.arrow")
    for part, about in ((train, report), (evaluation, report.eval)):
        if part is not None and about is not None and len(part) != about.sequences:
            raise ValueError(f"{len(part)} rows, but its report says {about.sequences}")
    left_out = folder / LEFT_OUT_NAME
    return BuiltData(train, evaluation, report, from_cache, digest, left_out if left_out.is_file() else None)


def _open(files: Sequence[str], settings: DataSettings) -> list[DataSource]:
    return [_open_one(found, settings) for found in resolve_files(files, split=settings.split)]


def _open_one(found: Path | HubDataset, settings: DataSettings) -> DataSource:
    if isinstance(found, Path):
        return DataSource(str(found), file_digest(found), partial(read_file, found), about_rows(found))
    hub_cache = None if settings.cache_dir is None else Path(settings.cache_dir).expanduser()
    rows = load_hub(found, split=settings.split, cache_dir=hub_cache)
    return DataSource(f"{found}@{settings.split}", rows._fingerprint, lambda on_bad: read_hub(rows, found), len(rows))
