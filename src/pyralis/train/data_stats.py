"""The batches that a config makes of its data, in numbers."""

from __future__ import annotations

import os
from typing import Any

import numpy as np

from pyralis.data.stats import Batching, BatchStats, batch_stats
from pyralis.train.config.train_config import TrainConfig


def data_stats(rows: Any, config: TrainConfig) -> BatchStats | None:
    """Statistics of the batches of `rows` (a dataset of `build_dataset`); None where lengths do not tell: of pairs,
    which share prompts, and of a stream."""
    if config.task_type == "dpo" or not hasattr(rows, "data"):
        return None
    lengths = rows.data["length"].to_numpy().astype(np.int64)
    batching = Batching.of(config, int(os.environ.get("WORLD_SIZE", "1")))
    return batch_stats(lengths, batching, None if config.packing else config.max_seq_length, config.seed)
