"""What decides how data becomes training rows."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pyralis.data.mixture import Stop
from pyralis.data.types import LossOn

TaskType = Literal["pretrain", "sft", "dpo"]
OnOverlong = Literal["truncate", "drop", "split", "error"]
OnBadRow = Literal["error", "skip"]


def _as_tuple(files: str | Path | list[str] | tuple[str, ...] | None) -> tuple[str, ...]:
    if not files:
        return ()
    return (str(files),) if isinstance(files, str | Path) else tuple(map(str, files))


@dataclass(frozen=True, slots=True)
class DataSettings:
    """The data fields of a config.

    Attributes:
        files, eval_files: paths, folders, globs or hub names.
        data_format: a name of `formats.FORMATS`, or "auto" to tell it by each file's first row.
        max_seq_length: longest row, in tokens.
        packing: fill rows up to max_seq_length; None packs in pretraining only.
        on_bad_row: what happens to a row that cannot be read, or that its format or template refuses.
        on_overlong: what happens to an example longer than max_seq_length (packed documents are never too long).
        max_data_lost: share of the rows left out, or of the tokens cut off or left out, past which the data is refused.
        max_prompt_length: of a preference longer than max_seq_length, the last tokens of the prompt that are kept in
            any case.
        eval_split: share of the training examples held out, drawn with `seed`; not together with eval_files.
        max_samples: take only the first rows of the training data.
        weights: of the entries of `files`, shares of the tokens (`mixture.py`); empty: all as they come.
        stop: where an epoch of a mixture ends.
        streaming: pretraining text read while it is trained on (`stream.py`), shuffled in blocks of `buffer_size` rows.
        num_workers: processes that tokenise, at most; the result does not depend on it.
        cache_dir: holds `datasets/`; by default $PYRALIS_CACHE, else $XDG_CACHE_HOME/pyralis, else ~/.cache/pyralis.
    """

    files: tuple[str, ...]
    max_seq_length: int
    eval_files: tuple[str, ...] = ()
    data_format: str = "auto"
    task_type: TaskType = "sft"
    loss_on: LossOn = "all_turns"
    packing: bool | None = None
    on_bad_row: OnBadRow = "error"
    on_overlong: OnOverlong = "truncate"
    max_data_lost: float = 0.5
    max_prompt_length: int = 512
    split: str = "train"
    eval_split: float = 0.0
    max_samples: int | None = None
    weights: tuple[float, ...] = ()
    stop: Stop = "all_exhausted"
    streaming: bool = False
    buffer_size: int = 1024
    num_workers: int = 1
    seed: int = 42
    cache_dir: str | None = None

    @property
    def packs(self) -> bool:
        return self.task_type == "pretrain" if self.packing is None else self.packing

    @classmethod
    def from_config(cls, config: Any) -> DataSettings:
        """From an object with the field names of a config file (`TrainConfig`)."""
        return cls(
            files=_as_tuple(config.train_file),
            max_seq_length=config.max_seq_length,
            eval_files=_as_tuple(config.eval_file),
            data_format=config.data_format,
            task_type=config.task_type,
            loss_on=config.loss_on,
            packing=config.packing,
            on_bad_row=config.on_bad_row,
            on_overlong=config.on_overlong,
            max_data_lost=config.max_data_lost,
            max_prompt_length=config.max_prompt_length,
            split=config.dataset_split,
            eval_split=config.eval_split,
            max_samples=config.max_samples,
            weights=tuple(config.source_weights or ()),
            stop=config.stopping_strategy,
            streaming=config.streaming,
            buffer_size=config.stream_buffer_size,
            num_workers=config.tokenize_num_workers,
            seed=config.seed if config.dataset_seed is None else config.dataset_seed,
            cache_dir=config.cache_dir,
        )
