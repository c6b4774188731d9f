"""A verification on the terminal: what was compared on what, the errors side by side, what is fast, the verdict."""

from __future__ import annotations

from collections.abc import Iterator

from rich import box
from rich.console import Group, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from pyralis.models.surgery import LayerReport
from pyralis.train.report.environment import Environment
from pyralis.verify.compare import COMPONENT_FACTOR, Compared
from pyralis.verify.result import Subject, Verification, dtype_name

TITLES = {"right": "padded right", "left": "padded left", "packed": "packed"}
SHOWN_FAILURES = 5  # a layout


def show(verification: Verification) -> RenderableType:
    """Fits into 80 columns."""
    parts: list[RenderableType] = [_facts(verification), Text()]
    if verification.comparisons:
        parts += [
            Text(f"Errors relative to the truth; Pyralis may have {COMPONENT_FACTOR:g} times stock's. ! fails."),
            Text(),
        ]
        parts += [_errors(verification), Text()]
    parts += [*_verdict(verification)]
    return Group(*parts)


def _facts(verification: Verification) -> Table:
    subject, environment = verification.subject, verification.environment
    table = Table.grid(padding=(0, 2))
    table.add_column(style="dim", no_wrap=True)
    table.add_column(overflow="fold")
    table.add_row("model", Text(subject.model))
    table.add_row("adapter", Text(subject.adapter))
    table.add_row("weights", f"{subject.base}, computing in {dtype_name(subject.dtype)}")
    table.add_row("batches", Text(f"{subject.shape[0]} x {subject.shape[1]} tokens of {subject.data}; no dropout"))
    table.add_row("truth", f"stock layers in {dtype_name(subject.truth)}")
    table.add_row("device", Text(_device(subject, environment)))
    versions = dict(environment.packages)
    table.add_row("versions", ", ".join(f"{name} {versions[name]}" for name in SOFTWARE if name in versions))
    for number, line in enumerate(_layers(verification.acceleration.layers)):
        table.add_row("" if number else "layers", Text(line))
    for number, note in enumerate((*verification.notes, *_run_notes(verification))):
        table.add_row("" if number else "notes", Text(note))
    return table


def _run_notes(verification: Verification) -> Iterator[str]:
    for comparison in verification.comparisons:
        if comparison.stock_runs > 1:
            yield (
                f"{TITLES[comparison.layout]}: stock is the worst of {comparison.stock_runs} runs, between which its "
                "embeddings move by half a step of the dtype: this batch amplifies rounding"
            )


SOFTWARE = ("pyralis", "torch", "triton", "transformers", "peft", "bitsandbytes")


def _device(subject: Subject, environment: Environment) -> str:
    if subject.device.startswith("cuda"):
        gpu = environment.gpus[int(subject.device.partition(":")[2] or 0)]
        major, minor = gpu.capability
        return f"{gpu.name}, compute capability {major}.{minor}, CUDA {environment.cuda}"
    return f"{environment.cpu}, {environment.cores} cores"


def _layers(layers: tuple[LayerReport, ...]) -> Iterator[str]:
    """ "0-29 fast", "30, 31 stock: ..." : neighbours that are alike in one line."""
    if not layers:
        yield "none found: all is stock"
    kinds: dict[tuple[bool, str], list[int]] = {}
    for layer in layers:
        kinds.setdefault((layer.fast, layer.reason), []).append(layer.index)
    for (fast, reason), indices in kinds.items():
        yield f"{_ranges(indices)} {'fast' if fast else f'stock: {reason}'}"


def _ranges(numbers: list[int]) -> str:
    runs: list[list[int]] = []
    for number in numbers:
        if runs and runs[-1][-1] == number - 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)


def _errors(verification: Verification) -> Table:
    """Relative errors to the truth: a row for each component, stock and fast for each layout."""
    table = Table(
        box=box.SIMPLE_HEAD,
        show_edge=False,
        pad_edge=False,
        padding=(0, 1, 0, 0),
    )
    table.add_column("", no_wrap=True)
    rows: dict[str, list[Compared | None]] = {}
    for place, comparison in enumerate(verification.comparisons):
        heading = TITLES[comparison.layout].replace(" ", "\n")
        table.add_column(f"{heading}\nstock", justify="right", style="dim", no_wrap=True)
        table.add_column("Pyralis", justify="right", no_wrap=True)
        for component in comparison.components:
            row = rows.setdefault(component.name, [None] * len(verification.comparisons))
            row[place] = component
    for name, row in rows.items():
        table.add_row(Text(name.removesuffix(".weight")), *(cell for compared in row for cell in _cells(compared)))
    return table


def _cells(compared: Compared | None) -> tuple[Text, Text]:
    if compared is None:
        return Text("-"), Text("-")
    fast = Text(f"{compared.fast:.1e}") if compared.passed else Text(f"!{compared.fast:.1e}", "bold red")
    return Text(f"{compared.stock:.1e}"), fast


def _verdict(verification: Verification) -> Iterator[RenderableType]:
    if not verification.comparisons:
        yield Text(
            "PASS: no layer is fast here, so all is stock transformers and there is nothing to compare.", "green"
        )
    elif verification.passed:
        layouts = ", ".join(TITLES[c.layout] for c in verification.comparisons)
        yield Text(
            f"PASS: {layouts}: Pyralis is as close to {dtype_name(verification.subject.truth)} as stock.", "green"
        )
    else:
        yield Text("FAIL: Pyralis is farther from the truth than stock may be.", "bold red")
        for comparison in verification.comparisons:
            yield from _failures(TITLES[comparison.layout], comparison.failures)
        yield Text("Train with acceleration: off, and please report this with the file of --json.")


def _failures(title: str, failures: tuple[Compared, ...]) -> Iterator[RenderableType]:
    for failure in failures[:SHOWN_FAILURES]:
        name = failure.name.removeprefix("base_model.model.").removesuffix(".weight")
        line = f"{title}: {name}: {failure.fast:.1e}, stock {failure.stock:.1e}, limit {failure.limit:.1e}"
        yield Padding(Text(line), (0, 0, 0, 2))
    if len(failures) > SHOWN_FAILURES:
        yield Padding(Text(f"{title}: and {len(failures) - SHOWN_FAILURES} tensors more"), (0, 0, 0, 2))
