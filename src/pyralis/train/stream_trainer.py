"""A trainer whose training data is a stream, and that resumes in the middle of it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from pyralis.data.stream import DocumentStream, Position
from pyralis.errors import ConfigError
from pyralis.train.checkpoints.checkpoint import write_json
from pyralis.train.trainer import PyralisTrainer

POSITION_NAME = "pyralis_stream.json"


class StreamTrainer(PyralisTrainer):
    """`PyralisTrainer` over a `DocumentStream`. A checkpoint holds where the stream was when its last step was taken;
    a run that goes on from it reads on from there. With several processes the first one reads for all."""

    _rows = 0
    _rng_of: str | None = None

    @property
    def stream(self) -> DocumentStream:
        data: Any = self.train_dataset
        return data  # type: ignore[no-any-return]

    def train(self, resume_from_checkpoint: Any = None, *args: Any, **kwargs: Any) -> Any:
        if resume_from_checkpoint:
            self.stream.seek(read_position(Path(resume_from_checkpoint)))
        self._rows = self.stream.start.rows
        return super().train(resume_from_checkpoint, *args, **kwargs)

    def get_batch_samples(self, epoch_iterator: Iterator, num_batches: int, device: torch.device) -> Any:
        batches, num_items = super().get_batch_samples(epoch_iterator, num_batches, device)
        rows = sum(len(batch["input_ids"]) for batch in batches)
        self._rows += rows * self.args.world_size  # each process was handed its share of what the first one read
        if self._rng_of is not None:  # a loader draws a seed when it is made, which the whole run did only once
            super()._load_rng_state(self._rng_of)
            self._rng_of = None
        return batches, num_items

    def _load_rng_state(self, checkpoint: str | None) -> None:
        super()._load_rng_state(checkpoint)
        self._rng_of = checkpoint

    def _save_rng_state(self, output_dir: str) -> None:
        super()._save_rng_state(output_dir)
        if self.args.should_save:
            write_json(Path(output_dir) / POSITION_NAME, self.stream.position_after(self._rows).to_json())


def read_position(checkpoint: Path) -> Position:
    """Raises ConfigError where the checkpoint has no readable position."""
    path = checkpoint / POSITION_NAME
    try:
        return Position.from_json(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(
            f"{checkpoint} cannot be resumed from: {path.name}, which says where the stream was, is missing or damaged "
            f"({error}). Was it saved with streaming: false?"
        ) from error
