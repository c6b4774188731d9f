"""The cache under processes that race for it, one of them killed in the middle."""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pytest
from datasets.table import MemoryMappedTable

from pyralis.data import processes
from pyralis.data.dataset import DataSettings, build_dataset
from pyralis.data.encode import Encoder
from tests.data.test_dataset import TEMPLATE, TOKENIZER, pairs, write

ROWS = 60


@pytest.fixture
def settings(tmp_path: Path) -> DataSettings:
    file = write(tmp_path / "rows.jsonl", [pairs((f"q{i}", f"a{i}")) for i in range(ROWS)])
    return DataSettings((file,), max_seq_length=200, num_workers=2, cache_dir=str(tmp_path / "cache"))


def build(settings: DataSettings, started: Path | None, results: Any) -> None:
    """Build, in processes of its own; where `started` is given, so slowly that it can be killed in the middle."""
    processes.PARALLEL_FROM_ROWS, processes.CHUNK_ROWS, processes.usable_cpus = 10, 5, lambda: 2
    encode = Encoder.encode

    def slowly(encoder: Encoder, rows: Any) -> Any:
        if started is not None:
            (started / str(os.getpid())).touch()
            time.sleep(60)
        return encode(encoder, rows)

    Encoder.encode = slowly  # type: ignore[method-assign]
    built = build_dataset(settings, TOKENIZER, TEMPLATE)
    results.put((built.from_cache, [row["input_ids"].tolist() for row in built.train]))


def wait_for(condition: Any, seconds: float = 20) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.02)


def alive(process: int) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text().split(") ")[1][0] != "Z"
    except FileNotFoundError:
        return False


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="processes are looked at through /proc")
def test_a_build_that_is_killed_stops_nobody(settings: DataSettings, tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    results = context.Queue()
    started = tmp_path / "started"
    started.mkdir()
    victim = context.Process(target=build, args=(settings, started, results))
    victim.start()
    wait_for(lambda: len(list(started.iterdir())) == 2)
    others: list[BaseProcess] = [context.Process(target=build, args=(settings, None, results)) for _ in range(3)]
    for process in others:
        process.start()
    assert victim.pid is not None
    try:
        os.kill(victim.pid, signal.SIGKILL)
        victim.join()
        # its workers end with it: they hold the lock as well, since they inherited it
        wait_for(lambda: not any(alive(int(path.name)) for path in started.iterdir()))
        found = [results.get(timeout=30) for _ in others]
    finally:
        for process in others:
            process.join(5)
            process.kill()
    assert sorted(from_cache for from_cache, _ in found) == [False, True, True]
    assert found[0][1] == found[1][1] == found[2][1]
    assert len(found[0][1]) == ROWS
    folders = [path.name for path in (tmp_path / "cache" / "datasets").iterdir()]
    assert len(folders) == 2, f"one built folder and its lock, nothing half made: {folders}"


def test_the_rows_lie_in_mapped_files(settings: DataSettings) -> None:
    built = build_dataset(settings, TOKENIZER, TEMPLATE)
    assert isinstance(built.train.data, MemoryMappedTable)
