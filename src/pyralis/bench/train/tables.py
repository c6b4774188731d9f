"""The tables of `pyralis bench train`: in a terminal, and as Markdown for docs/performance.md."""

from __future__ import annotations

from collections.abc import Sequence

from rich import box
from rich.table import Table

from pyralis.bench.train.losses import differs, reference_of
from pyralis.bench.train.peers import PYRALIS
from pyralis.bench.train.results import Record, Run

GIB = 2**30
NAMES = ("tokens", "peer", "keeps", "loop")
FIGURES = ("ms", "CPU ms", "tokens/s", "MFU", "peak GiB", "reserved GiB", "kernels", "busy ms")
LOSSES = ("first losses", "as HF")


def speed_table(record: Record) -> Table:
    """A row per case, the cases of a shape together, the quickest first."""
    return _table(record, (*NAMES, *FIGURES), title=title(record), caption=caption(record))


def loss_table(record: Record) -> Table:
    """What each case learnt in its first steps, beside Hugging Face's."""
    return _table(record, (*NAMES, *LOSSES))


def markdown_table(record: Record) -> str:
    """For docs/performance.md: what was run, and a row per case."""
    versions = ", ".join(f"{name} {version}" for name, version in record.versions.items())
    columns = _used(record, (*NAMES, *FIGURES, *LOSSES))
    lines = [
        f"{title(record)}; {versions}. {caption(record)}",
        "",
        f"| {' | '.join(columns)} |",
        "|" + "---|" * len(columns),
    ]
    for run in ordered(record.runs):
        cells = row(record, run)
        lines.append(f"| {' | '.join(cells[column] for column in columns)} |")
    return "\n".join([*lines, *(f"\n{failure}" for failure in failures(record))])


def loading_lines(record: Record) -> list[str]:
    """How long each peer takes until it trains."""
    lines = []
    for one in record.loaded:
        first = next(
            (r.measured for r in record.runs if (r.case.peer, r.case.variant) == (one.peer, one.variant)), None
        )
        step = "" if first is None else f", first step {first.first_step:.1f} s"
        lines.append(
            f"{one.peer} {one.variant}: imported in {one.import_seconds:.1f} s, loaded in {one.seconds:.1f} s{step}"
        )
    return lines


def failures(record: Record) -> list[str]:
    """The cases without measurements, those of one cause together."""
    causes: dict[tuple[str, str], list[str]] = {}
    for run in record.runs:
        if run.error is not None:
            where = f"{run.case.variant} {run.case.loop} {run.case.shape}"
            causes.setdefault((run.case.peer, run.error), []).append(where)
    return [f"{peer} ({', '.join(where)}): {error}" for (peer, error), where in causes.items()]


def title(record: Record) -> str:
    bench, rates = record.bench, record.rates
    rank = "" if bench.mode == "full" else f", rank {bench.rank}"
    gpu = "no GPU" if rates is None else f"{rates.gpu}, matmul {rates.matmul_flops_per_s / 1e12:.0f} TFLOP/s"
    return f"{bench.model}, {bench.mode}{rank}; {gpu}"


def caption(record: Record) -> str:
    bench = record.bench
    dropout = "" if bench.mode == "full" else f", LoRA dropout {bench.dropout:g}"
    return f"Medians of {bench.steps} steps: forward, loss, backward, 8-bit AdamW; random weights{dropout}."


def ordered(runs: Sequence[Run]) -> list[Run]:
    """By shape as they came, then from the quickest to what could not run."""
    shapes = list(dict.fromkeys(run.case.shape for run in runs))
    return sorted(runs, key=lambda run: (shapes.index(run.case.shape), run.case.loop, _seconds(run)))


def row(record: Record, run: Run) -> dict[str, str]:
    """The cells of a case, by column."""
    case, measured = run.case, run.measured
    cells = dict.fromkeys((*NAMES, *FIGURES, *LOSSES), "-")
    cells |= {"tokens": str(case.shape), "peer": case.peer, "keeps": case.variant, "loop": case.loop}
    if measured is None:
        return cells | {"ms": "failed"}
    utilisation = record.utilisation(run)
    cells |= {
        "ms": f"{run.seconds * 1e3:.1f}",
        "CPU ms": f"{run.cpu_seconds * 1e3:.1f}",
        "tokens/s": f"{run.tokens_per_second:.0f}",
        "MFU": "-" if utilisation is None else f"{utilisation:.0%}",
        "first losses": " ".join(f"{loss:.4f}" for loss in measured.losses),
        "as HF": _verdict(record, run),
    }
    if measured.peak_reserved:
        cells["peak GiB"] = f"{measured.peak_allocated / GIB:.2f}"
        cells["reserved GiB"] = f"{measured.peak_reserved / GIB:.2f}"
    if measured.kernels is not None and measured.busy_seconds is not None:
        cells["kernels"], cells["busy ms"] = str(measured.kernels), f"{measured.busy_seconds * 1e3:.1f}"
    return cells


def _verdict(record: Record, run: Run) -> str:
    if record.bench.dropout:
        return "-"
    if reference_of(run, record.runs) is run:
        return "reference"
    return {None: "-", True: "NO", False: "yes"}[differs(run, record.runs)]


def _table(record: Record, columns: Sequence[str], title: str | None = None, caption: str | None = None) -> Table:
    built = Table(
        title=title, caption=caption, box=box.SIMPLE, padding=(0, 0, 0, 1), pad_edge=False,
        title_justify="left", caption_justify="left",
    )  # fmt: skip
    columns = _used(record, columns)
    for column in columns:
        figure = column in FIGURES
        # A heading of two words takes two lines: all columns then fit into 100 characters.
        heading = column.replace(" ", "\n") if figure else column
        built.add_column(heading, justify="right" if figure else "left", no_wrap=True)
    runs = ordered(record.runs)
    for run, following in zip(runs, [*runs[1:], None]):
        last = following is not None and following.case.shape != run.case.shape
        cells = row(record, run)
        style = {"NO": "red", "-": None}.get(cells["as HF"], "bold" if run.case.peer == PYRALIS else None)
        built.add_row(*(cells[column] for column in columns), style=style, end_section=last)
    return built


def _used(record: Record, columns: Sequence[str]) -> list[str]:
    """Without those that no run has, and without the loop where there is but one."""
    rows = [row(record, run) for run in record.runs]
    used = [column for column in columns if any(cells[column] != "-" for cells in rows)]
    return [c for c in used if c != "loop" or len({cells["loop"] for cells in rows}) > 1]


def _seconds(run: Run) -> float:
    return float("inf") if run.measured is None else run.seconds
