"""Rows in batches of like lengths, so that little is padding, without a bias in what is learnt when."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import ArrayLike, NDArray
from torch.utils.data import Sampler

STEPS_TOGETHER = 50
"""Rows of so many steps are sorted together: enough that lengths are alike, few enough that company changes."""


class GroupedSampler(Sampler[int]):
    """Every row once an epoch, in steps of `step_rows` rows of like lengths.

    An epoch's rows are shuffled, sorted by length within chunks of STEPS_TOGETHER steps, cut into steps, and the steps
    are shuffled. So when a row comes does not depend on its length, and neither does who is left over for the short
    last step, which `dataloader_drop_last` drops: those are drawn first. Within a step rows are in order of length,
    which makes its micro-batches, on whatever ranks, of like lengths too; which rows make a step depends on the seed,
    the epoch and `step_rows` alone, not on how a step is split into micro-batches.

    transformers' own group_by_length goes from long rows to short ones within a chunk, begins with the longest of all,
    and leaves the shortest of the last chunk over.
    """

    def __init__(self, lengths: ArrayLike, step_rows: int, seed: int) -> None:
        """lengths: [rows] in tokens. step_rows: rows of an optimizer step, over micro-batches and ranks."""
        self._lengths = np.asarray(lengths)
        self._step_rows = step_rows
        self._seed = seed
        self._epoch = 0

    def __len__(self) -> int:
        return len(self._lengths)

    def set_epoch(self, epoch: int) -> None:
        """Called by the Trainer; an epoch's order depends on the seed and its number, so that resuming finds it."""
        self._epoch = epoch

    def __iter__(self) -> Iterator[int]:
        return iter(self.order().tolist())

    def order(self) -> NDArray[np.int64]:
        """The rows of this epoch, in order."""
        random = np.random.default_rng((self._seed, self._epoch))
        rows = random.permutation(len(self))
        full = len(rows) // self._step_rows * self._step_rows
        rows, left = rows[:full], rows[full:]
        together = STEPS_TOGETHER * self._step_rows
        chunks = [self._by_length(rows[start : start + together]) for start in range(0, full, together)]
        steps = np.concatenate(chunks).reshape(-1, self._step_rows) if chunks else rows.reshape(0, self._step_rows)
        return np.concatenate([random.permutation(steps).reshape(-1), self._by_length(left)])

    def _by_length(self, rows: NDArray[np.int64]) -> NDArray[np.int64]:
        return rows[np.argsort(self._lengths[rows], kind="stable")]
