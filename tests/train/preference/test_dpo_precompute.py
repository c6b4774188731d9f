"""Reference values in parts: shared between processes, found again, computed anew where they are damaged."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset
from torch import Tensor

from pyralis.data.store import PAIR_COLUMNS, read_dataset, write_rows
from pyralis.train.preference import dpo_precompute as module
from pyralis.train.preference.dpo_precompute import content_key, precompute


@pytest.fixture
def rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Dataset:
    monkeypatch.setattr(module, "PART_ROWS", 5)
    made = [
        {
            "input_ids": np.full(3 + i % 4, i, np.int32),
            "labels": np.zeros(3 + i % 4, np.int32),
            "pair_lengths": (1, 1, 1),
        }
        for i in range(13)
    ]
    write_rows(tmp_path / "rows.arrow", PAIR_COLUMNS, made)
    return read_dataset(tmp_path / "rows.arrow")


def collate(examples: Any) -> dict[str, Tensor]:
    return {"ids": torch.tensor([int(example["input_ids"][0]) for example in examples])}


def compute(batch: Any) -> Tensor:
    return torch.cat([batch["ids"] * 10.0, batch["ids"] * -10.0])


WANTED = np.stack([np.arange(13) * 10.0, np.arange(13) * -10.0], 1).astype(np.float32)


def test_parts_are_found_again_and_damaged_ones_are_not_believed(rows: Dataset, tmp_path: Path) -> None:
    folder, done, sizes = tmp_path / "values", [], []

    def counted(batch: Any) -> Tensor:
        sizes.append(len(batch["ids"]))
        return compute(batch)

    assert np.array_equal(precompute(rows, collate, counted, folder, batch_size=2, progress=done.append), WANTED)
    assert done == [5, 10, 13]
    assert sizes == [2, 2, 1, 2, 2, 1, 2, 1]
    assert sorted(path.name for path in folder.iterdir()) == [f"{start:09d}.npy" for start in (0, 5, 10)]
    sizes.clear()
    assert np.array_equal(precompute(rows, collate, counted, folder, batch_size=2), WANTED)
    assert not sizes
    (folder / "000000005.npy").write_bytes((folder / "000000005.npy").read_bytes()[:-4])
    np.save(folder / "000000010.npy", WANTED[:2])
    assert np.array_equal(precompute(rows, collate, counted, folder, batch_size=2), WANTED)
    assert sizes == [2, 2, 1, 2, 1]


def test_a_killed_run_goes_on_where_it_was(rows: Dataset, tmp_path: Path) -> None:
    def dies(batch: Any) -> Tensor:
        if int(batch["ids"].max()) > 6:
            raise KeyboardInterrupt
        return compute(batch)

    with pytest.raises(KeyboardInterrupt):
        precompute(rows, collate, dies, tmp_path / "values", batch_size=1)
    kept = precompute(rows, collate, compute, tmp_path / "values", batch_size=3)
    assert np.array_equal(kept, WANTED)


def test_processes_stay_in_step(rows: Dataset, tmp_path: Path) -> None:
    """Three of them, as threads: each computes equally often, and all have all values."""
    barrier, shared, calls = threading.Barrier(3), [torch.zeros(0)] * 3, [0] * 3
    results: list[Any] = [None] * 3

    def summed(rank: int) -> Callable[[Tensor], Tensor]:
        def run(tensor: Tensor) -> Tensor:
            shared[rank] = tensor
            barrier.wait()
            total = torch.stack(list(shared)).sum(0)
            barrier.wait()
            return total

        return run

    def work(rank: int) -> None:
        def counted(batch: Any) -> Tensor:
            calls[rank] += 1
            return compute(batch)

        results[rank] = precompute(
            rows, collate, counted, tmp_path / "values", batch_size=2, summed=summed(rank), rank=rank, processes=3
        )

    threads = [threading.Thread(target=work, args=(rank,)) for rank in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert calls == [3, 3, 3]  # 3 + 3 + 2 batches of 3 parts
    for result in results:
        assert np.array_equal(result, WANTED)


def test_a_key_is_of_tokens_lengths_and_what_is_said(rows: Dataset) -> None:
    keys = {content_key(rows, "a"), content_key(rows, "b"), content_key(rows.select(range(12)).flatten_indices(), "a")}
    assert len(keys) == 3
    assert content_key(rows, "a") in keys
