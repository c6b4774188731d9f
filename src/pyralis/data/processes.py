"""Rows encoded in one process or several, with the same result."""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import signal
import sys
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from itertools import chain, islice

from pyralis.data.encode import Encoder
from pyralis.data.encoded_row import EncodedChunk, RawRow
from pyralis.errors import DataError

CHUNK_ROWS = 256
# Forking two processes takes 0.14 s and sending back a chunk of 1024-token rows 5 ms, against 1.5 s to tokenise it:
# from here on it always pays.
PARALLEL_FROM_ROWS = 2000

_PR_SET_PDEATHSIG = 1  # <linux/prctl.h>


def encode_rows(rows: Iterable[RawRow], encoder: Encoder) -> Iterator[EncodedChunk]:
    """Chunks in the order of the rows, the same for any number of processes."""
    rows = iter(rows)
    head = list(islice(rows, PARALLEL_FROM_ROWS))
    processes = min(encoder.settings.num_workers, usable_cpus())
    chunks = _in_chunks(chain(head, rows))
    if processes < 2 or len(head) < PARALLEL_FROM_ROWS:
        yield from map(encoder.encode, chunks)
    else:
        yield from _in_processes(chunks, encoder, processes)


def usable_cpus() -> int:
    """CPUs of this process; 1 where processes cannot be forked safely."""
    return len(os.sched_getaffinity(0)) if sys.platform == "linux" else 1


def _in_chunks(rows: Iterator[RawRow]) -> Iterator[list[RawRow]]:
    while chunk := list(islice(rows, CHUNK_ROWS)):
        yield chunk


_encoder: Encoder | None = None


def _start_process(encoder: Encoder, parent: int) -> None:
    global _encoder
    _end_with(parent)
    for number in (signal.SIGINT, signal.SIGTERM):  # sent to the whole group; the parent decides what comes of it
        signal.signal(number, signal.SIG_IGN)
    # a forked process must not use the parent's tokenizer threads
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    _encoder = encoder


def _end_with(parent: int) -> None:
    """Have the kernel end this process when its parent ends, also by SIGKILL. It would wait for work for ever, and hold
    the lock on the dataset cache, which it inherited."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it ended before
        os._exit(1)


def _encode(chunk: list[RawRow]) -> EncodedChunk:
    assert _encoder is not None
    return _encoder.encode(chunk)


def _in_processes(chunks: Iterator[list[RawRow]], encoder: Encoder, processes: int) -> Iterator[EncodedChunk]:
    # fork: nothing is imported or pickled again (a spawned process needs 5-10 s for transformers alone)
    context = multiprocessing.get_context("fork")
    pool = ProcessPoolExecutor(processes, context, initializer=_start_process, initargs=(encoder, os.getpid()))
    running: deque[Future[EncodedChunk]] = deque()
    try:
        for chunk in chunks:
            running.append(pool.submit(_encode, chunk))
            if len(running) > 2 * processes:
                yield running.popleft().result()
        while running:
            yield running.popleft().result()
    except BrokenProcessPool as error:
        raise DataError(
            "A process that tokenised died, probably for want of memory. Set tokenize_num_workers to a smaller number."
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)
