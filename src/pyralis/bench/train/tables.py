"""The tables of `pyralis bench train`: in a terminal, and as Markdown for docs/performance.md."""

from __future__ import annotations

from collections.abc import Sequence

from rich.table import Table

from pyralis.bench.train.losses import differs, reference_of
from pyralis.bench.train.peers import PYRALIS
from pyralis.bench.train.results import Loaded, Record, Run

GIB = 2**30
COLUMNS = (
    "tokens", "peer", "keeps", "loop", "ms", "CPU ms", "tokens/s", "MFU", "peak GiB", "reserved", "kernels",
    "busy ms", "first step s", "first losses", "as HF",
)  # fmt: skip
LEFT = {"tokens", "peer", "keeps", "loop", "first losses", "as HF"}


def rich_table(record: Record) -> Table:
    """A row per case, the cases of a shape together."""
    bench = record.bench
    title = f"{bench.model}, {bench.mode}" + ("" if bench.mode == "full" else f" of rank {bench.rank}")
    built = Table(title=f"{title}; {record.rates or 'no GPU'}", caption=_caption(record))
    columns = _columns(record)
    for column in columns:
        built.add_column(column, justify="left" if column in LEFT else "right", no_wrap=column != "first losses")
    for run in ordered(record.runs):
        cells = row(record, run)
        wrong = run.case.peer == PYRALIS and cells["as HF"] == "NO"
        built.add_row(*(cells[column] for column in columns), style="red" if wrong else None)
    return built


def markdown_table(record: Record) -> str:
    """For docs/performance.md: what was run, and a row per case."""
    versions = ", ".join(f"{name} {version}" for name, version in record.versions.items())
    rates = record.rates
    machine = (
        "no GPU"
        if rates is None
        else f"{rates.gpu}; matmul {rates.matmul_flops_per_s / 1e12:.0f} TFLOP/s in the same session"
    )
    columns = _columns(record)
    lines = [
        f"{machine}; {versions}. {_caption(record)}",
        "",
        f"| {' | '.join(columns)} |",
        "|" + "---|" * len(columns),
    ]
    for run in ordered(record.runs):
        cells = row(record, run)
        lines.append(f"| {' | '.join(cells[column].replace('|', '/') for column in columns)} |")
    return "\n".join(lines)


def loading_lines(loaded: Sequence[Loaded]) -> list[str]:
    return [
        f"{one.peer} ({one.variant}): imported in {one.import_seconds:.1f} s, loaded in {one.seconds:.1f} s more"
        for one in loaded
    ]


def ordered(runs: Sequence[Run]) -> list[Run]:
    """By shape as they came, then from the quickest to what could not run."""
    shapes = list(dict.fromkeys(run.case.shape for run in runs))
    return sorted(runs, key=lambda run: (shapes.index(run.case.shape), run.case.loop, _seconds(run)))


def row(record: Record, run: Run) -> dict[str, str]:
    """The cells of a case, by column."""
    case, measured = run.case, run.measured
    cells = dict.fromkeys(COLUMNS, "-")
    cells |= {"tokens": str(case.shape), "peer": case.peer, "keeps": case.variant, "loop": case.loop}
    if measured is None:
        return cells | {"ms": "failed", "first losses": run.error or ""}
    utilisation = record.utilisation(run)
    cells |= {
        "ms": f"{run.seconds * 1e3:.1f}",
        "CPU ms": f"{run.cpu_seconds * 1e3:.1f}",
        "tokens/s": f"{run.tokens_per_second:.0f}",
        "MFU": "-" if utilisation is None else f"{utilisation:.0%}",
        "first step s": f"{measured.first_step:.1f}",
        "first losses": " ".join(f"{loss:.4f}" for loss in measured.losses),
        "as HF": _verdict(record, run),
    }
    if measured.peak_reserved:
        cells["peak GiB"] = f"{measured.peak_allocated / GIB:.2f}"
        cells["reserved"] = f"{measured.peak_reserved / GIB:.2f}"
    if measured.kernels is not None and measured.busy_seconds is not None:
        cells["kernels"], cells["busy ms"] = str(measured.kernels), f"{measured.busy_seconds * 1e3:.1f}"
    return cells


def _verdict(record: Record, run: Run) -> str:
    if record.bench.dropout:
        return "-"
    if reference_of(run, record.runs) is run:
        return "reference"
    return {None: "-", True: "NO", False: "yes"}[differs(run, record.runs)]


def _columns(record: Record) -> list[str]:
    """Without those that no run has."""
    rows = [row(record, run) for run in record.runs]
    return [column for column in COLUMNS if any(cells[column] != "-" for cells in rows)]


def _caption(record: Record) -> str:
    bench = record.bench
    return (
        f"Medians of {bench.steps} steps after {bench.warmup}: forward, loss, backward, 8-bit AdamW; LoRA dropout "
        f"{bench.dropout:g}, random weights."
    )


def _seconds(run: Run) -> float:
    return float("inf") if run.measured is None else run.seconds
