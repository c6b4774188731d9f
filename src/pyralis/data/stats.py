"""What rows of these lengths mean for a run: steps, padding, and what packing would save."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pyralis.data.grouped import GroupedSampler
from pyralis.data.pack import bin_pack

Lengths = NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Batching:
    """How rows become optimizer steps. `processes`: ranks that each take a micro-batch of their own."""

    micro_batch: int
    accumulation: int
    epochs: float
    max_steps: int = -1
    drop_last: bool = False
    processes: int = 1

    @classmethod
    def of(cls, arguments: Any, processes: int = 1) -> Batching:
        """From an object with the field names of `TrainingArguments`, such as a config."""
        return cls(
            arguments.per_device_train_batch_size,
            arguments.gradient_accumulation_steps,
            arguments.num_train_epochs,
            arguments.max_steps,
            arguments.dataloader_drop_last,
            processes,
        )

    @property
    def rows(self) -> int:
        """That `max_steps` take, of data without end."""
        return self.max_steps * self.accumulation * self.micro_batch * self.processes

    def steps(self, rows: int) -> tuple[int, float]:
        """(optimizer steps, epochs) as the Trainer will count them."""
        batch = self.micro_batch * self.processes
        micro_batches = rows // batch if self.drop_last else -(-rows // batch)
        per_epoch = max(1, -(-micro_batches // self.accumulation))
        if self.max_steps > 0:
            return self.max_steps, round(self.max_steps / per_epoch, 2)
        return math.ceil(per_epoch * self.epochs), float(self.epochs)


@dataclass(frozen=True, slots=True)
class Packed:
    """What packing would come to: rows, steps of the same batch size, and the share of a row's room that holds tokens.
    Where padding is not computed, fewer steps of more tokens each are what is gained."""

    rows: int
    steps: int
    fill: float


@dataclass(frozen=True, slots=True)
class BatchStats:
    """Numbers about the batches of a run.

    Attributes:
        steps, epochs: of the whole run.
        padding: share of a padded batch that is padding, rows drawn at random.
        grouped_padding: the same, rows grouped by length (`train_sampling_strategy: group_by_length`).
        packed: what packing would make of it; None where the rows are packed already, or cannot be.
    """

    steps: int
    epochs: float
    padding: float
    grouped_padding: float
    packed: Packed | None = None

    def lines(self) -> list[str]:
        """In plain words, for a terminal."""
        lines = [f"{self.steps:,} steps in {self.epochs:g} epochs"]
        padded = f"padding: {self.padding:.1%} of a batch of rows drawn at random"
        if self.padding >= 0.005:
            padded += f", {self.grouped_padding:.1%} with train_sampling_strategy: group_by_length"
        lines.append(padded)
        if self.packed is not None:
            packed = self.packed
            lines.append(
                f"with packing: true: {packed.rows:,} rows, {packed.fill:.1%} full, in {packed.steps:,} steps of the "
                "same batch size"
            )
        return lines


def batch_stats(lengths: Lengths, batching: Batching, room: int | None = None, seed: int = 0) -> BatchStats:
    """Statistics of batches of rows of these lengths, in tokens.

    Args:
        lengths: [rows] int.
        room: length of a packed row, where packing is to be tried.
    """
    steps, epochs = batching.steps(len(lengths))
    order = np.random.default_rng(seed).permutation(len(lengths))
    tokens = int(lengths.sum(dtype=np.int64))
    padded = padded_positions(lengths[order], batching.micro_batch)
    step_rows = batching.micro_batch * batching.accumulation * batching.processes
    together = GroupedSampler(lengths, step_rows, seed).order()
    grouped = padded_positions(lengths[together], batching.micro_batch)
    packed = None
    if room is not None:
        rows = len(bin_pack(lengths.tolist(), room))
        packed_steps, _ = batching.steps(rows)
        packed = Packed(rows, packed_steps, tokens / (rows * room))
    return BatchStats(steps, epochs, 1 - tokens / padded, 1 - tokens / grouped, packed)


def padded_positions(lengths: Lengths, batch: int) -> int:
    """Positions of batches of `batch` rows in this order, each padded to its longest."""
    starts = np.arange(0, len(lengths), batch)
    sizes = np.diff([*starts, len(lengths)])
    return int((np.maximum.reduceat(lengths, starts).astype(np.int64) * sizes).sum())
