"""`python -m pyralis.bench.train.worker JOB`: all cases of one peer, a line of JSON for each when it is known."""

from __future__ import annotations

import sys
import time
from importlib import import_module
from itertools import groupby
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter

from pyralis.bench.train.peers import PEERS
from pyralis.bench.train.settings import Job, cases


def main() -> None:
    job = TypeAdapter(Job).validate_json(Path(sys.argv[1]).read_bytes())
    module, _, name = PEERS[job.peer.name].runner.partition(":")
    # Before anything else that is heavy: Unsloth has to come before the libraries that it changes.
    peer_class = getattr(import_module(f"pyralis.bench.train.peers.{module}"), name)
    from pyralis.bench.train.peers.base import free_memory
    from pyralis.bench.train.results import Loaded, Run

    ready = time.time()
    import_seconds = ready - job.started
    peer: Any = None
    warmup = job.bench.warmup + PEERS[job.peer.name].warmup
    for variant, group in groupby(cases(job.bench, job.peer), key=lambda case: case.variant):
        try:
            peer = peer or peer_class(job)
            peer.load(variant)
        except Exception as error:  # whatever a peer raises is its result; the others go on
            said = _said(error)
            for case in group:
                _append(job, Run(case, error=said))
            continue
        _append(job, Loaded(job.peer.name, variant, import_seconds, time.time() - ready))
        for case in group:
            if job.deadline is not None and time.time() > job.deadline:
                return
            try:
                run = Run(case, measured=peer.run(variant, case.loop, case.shape, warmup))
            except Exception as error:
                run = Run(case, error=_said(error))
            _append(job, run)
            free_memory()
        ready = time.time()


def _append(job: Job, line: Any) -> None:
    from pyralis.bench.train.results import RUN_OR_LOADED

    with job.results.open("ab") as file:
        file.write(RUN_OR_LOADED.dump_json(line) + b"\n")


def _said(error: Exception) -> str:
    import traceback

    from pyralis.ops._shortage import ran_short

    traceback.print_exception(error)
    if ran_short(error):
        return OUT_OF_MEMORY
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[-1]}"[:300]


OUT_OF_MEMORY = "out of memory"


if __name__ == "__main__":
    main()
