"""Reference log-probabilities computed before training, kept on disk by content and part by part.

A run that is killed meanwhile goes on with the part that it was at; the next run with the same weights and rows finds
all of them. Processes share the work and stay in step, as sharded models need it.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from numpy.typing import NDArray
from torch import Tensor

from pyralis.train.preference.dpo_scores import Batch

PART_ROWS = 1024
Values = NDArray[np.float32]
Compute = Callable[[Batch], Tensor]
"""A batch of `PairCollator` -> [S] float32, chosen first."""


def content_key(rows: Dataset, *about: object) -> str:
    """Of the token ids of preference rows, and of whatever else decides on the log-probabilities."""
    digest = hashlib.sha256(json.dumps(about, default=str).encode())
    for column in ("input_ids", "pair_lengths"):
        for chunk in rows.data[column].chunks:
            digest.update(np.ascontiguousarray(chunk.flatten().to_numpy(zero_copy_only=False)).tobytes())
    return digest.hexdigest()[:32]


def precompute(
    rows: Dataset,
    collate: Callable[[Sequence[Any]], Batch],
    compute: Compute,
    folder: Path,
    *,
    batch_size: int,
    summed: Callable[[Tensor], Tensor] = lambda tensor: tensor,
    rank: int = 0,
    processes: int = 1,
    device: torch.device | None = None,
    progress: Callable[[int], None] | None = None,
) -> Values:
    """[rows, 2] float32: log p of the chosen and of the rejected answer of each row under the reference.

    Args:
        compute: is called equally often in every process.
        folder: of this content (`content_key`); parts that lie there in every process's view are not computed again.
        summed: the sum of a tensor over processes.
        device: where `summed` wants its tensors.
        progress: told how many rows are done.
    """
    folder.mkdir(parents=True, exist_ok=True)
    parts = []
    for start in range(0, len(rows), PART_ROWS):
        indices = range(start, min(start + PART_ROWS, len(rows)))
        path = folder / f"{start:09d}.npy"
        part = _load(path, len(indices))
        if int(summed(torch.tensor(part is not None, dtype=torch.int64, device=device))) < processes or part is None:
            values = torch.zeros((len(indices), 2), dtype=torch.float32, device=device)
            for batch in _shares(_by_length(rows, indices), batch_size, rank, processes):
                own = batch is not None
                taken = batch if batch is not None else [indices[0]]
                logps = compute(collate([rows[i] for i in taken]))
                if own:
                    values[[i - start for i in taken]] = torch.stack(logps.chunk(2), 1).to(values.device)
            part = summed(values).cpu().numpy()
            if rank == 0:
                _save(path, part)
        parts.append(part)
        if progress is not None:
            progress(indices[-1] + 1)
    return np.concatenate(parts)


def _by_length(rows: Dataset, indices: range) -> list[int]:
    """Similar lengths together, the longest first: what does not fit in memory shows at once."""
    lengths = rows.data["length"].slice(indices.start, len(indices)).to_pylist()
    return sorted(indices, key=lambda i: -lengths[i - indices.start])


def _shares(indices: Sequence[int], size: int, rank: int, processes: int) -> Iterator[list[int] | None]:
    """The batches of this process; None where only others have one left."""
    batches = [list(indices[start : start + size]) for start in range(0, len(indices), size)]
    for first in range(0, len(batches), processes):
        yield batches[first + rank] if first + rank < len(batches) else None


def _load(path: Path, rows: int) -> Values | None:
    """A part that is there and whole."""
    try:
        found: Values = np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError):
        return None
    return found if found.shape == (rows, 2) and found.dtype == np.float32 else None


def _save(path: Path, values: Values) -> None:
    staging = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with staging.open("wb") as file:
        np.save(file, values)
    os.replace(staging, path)
