"""What `pyralis bench train` prints and leaves behind."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from rich.console import Console

from pyralis.bench.train.losses import differs
from pyralis.bench.train.peers import PYRALIS
from pyralis.bench.train.plot import plot_steps
from pyralis.bench.train.results import Record
from pyralis.bench.train.run import measure
from pyralis.bench.train.settings import TrainBench
from pyralis.bench.train.tables import failures, loading_lines, loss_table, speed_table
from pyralis.bench.train.worker import OUT_OF_MEMORY


def bench_train(
    bench: TrainBench,
    work_dir: Path,
    out: Path,
    time_limit: float | None = None,
    report: Callable[[str], None] = print,
) -> list[str]:
    """Measure; write train-MODEL-MODE.json and .png into `out`; print the table. What is wrong with Pyralis's runs."""
    out.mkdir(parents=True, exist_ok=True)
    path = out / f"train-{Path(bench.model).name}-{bench.mode}.json"
    record = measure(bench, work_dir.expanduser().resolve(), lambda record: record.write(path), time_limit, report)
    console = Console()
    # A log has no width; 80 columns would cut every figure.
    console = console if console.is_terminal else Console(width=200)
    console.print(speed_table(record), loss_table(record))
    for line in [*failures(record), *loading_lines(record)]:
        console.print(line, highlight=False, markup=False)
    if any(run.measured is not None for run in record.runs):
        plot_steps(path.with_suffix(".png"), record)
        report(f"written: {path}, {path.with_suffix('.png')}")
    return faults(record)


def faults(record: Record) -> list[str]:
    """Of our own runs: errors other than a lack of memory or time, and first losses that are not Hugging Face's."""
    found = []
    for run in (run for run in record.runs if run.case.peer == PYRALIS):
        name = f"pyralis {run.case.variant}, {run.case.loop} loop, {run.case.shape}"
        if run.error is not None and run.error != OUT_OF_MEMORY and not run.error.startswith("not run"):
            found.append(f"{name}: {run.error}")
        elif not record.bench.dropout and differs(run, record.runs):
            found.append(f"{name}: the first losses are not Hugging Face's")
    return found
