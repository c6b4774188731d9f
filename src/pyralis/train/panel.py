"""The panels at the beginning and the end of a run. They read the same without colours and at 80 columns."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rich import box
from rich.console import Group, RenderableType
from rich.padding import Padding
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from pyralis.train.format import count_text, duration_text, gib_text, loss_text, number_of, percent_text
from pyralis.train.summary import RunSummary

MOOD_STYLE = {"good": "green", "warn": "yellow", "bad": "red"}


@dataclass(frozen=True, slots=True)
class DataLine:
    """One split of the data: `name` as "train" or "eval"."""

    name: str
    rows: int
    tokens: int
    supervised_tokens: int


@dataclass(frozen=True, slots=True)
class StartupInfo:
    """What is about to be trained. Memory is per GPU in GiB; None where it is not known."""

    model: str
    architecture: str
    parameters: int
    trainable_parameters: int
    task: str
    mode: str
    dtype: str
    device: str
    data: Sequence[DataLine]
    micro_batch_size: int
    grad_accum_steps: int
    world_size: int
    steps: int
    epochs: float
    optimizer: str
    learning_rate: float
    schedule: str
    output_dir: Path
    quantization: str | None = None
    max_seq_length: int | None = None
    acceleration: Sequence[str] = ()
    predicted_memory_gib: float | None = None
    available_memory_gib: float | None = None
    resumed_from: str | None = None
    notes: Sequence[str] = ()
    warnings: Sequence[str] = ()


@dataclass(frozen=True, slots=True)
class FinalInfo:
    """What came of it. A path that was not written is None. `next_commands` are (command, what it does)."""

    summary: RunSummary
    result_dir: Path
    metrics: Path | None = None
    picture: Path | None = None
    report: Path | None = None
    next_commands: Sequence[tuple[str, str]] = ()
    notes: Sequence[str] = ()
    warnings: Sequence[str] = ()


def startup_panel(info: StartupInfo) -> RenderableType:
    table = _table()
    _add(table, "model", _joined(Text(info.model, "bold"), info.architecture))
    share = percent_text(info.trainable_parameters / max(info.parameters, 1))
    trains = f"{count_text(info.trainable_parameters)} of {count_text(info.parameters)} parameters ({share})"
    _add(table, "trains", _joined(trains, info.mode, info.dtype, info.quantization))
    _add(table, "device", info.device)
    for line in info.data:
        supervised = percent_text(line.supervised_tokens / max(line.tokens, 1))
        tokens = f"{count_text(line.tokens)} tokens, {supervised} of them supervised"
        _add(table, f"{line.name} data", _joined(number_of(line.rows, "row"), tokens))
    _add(table, "batch", _batch_text(info))
    _add(table, "steps", _joined(f"{info.steps:,}", f"{info.epochs:g} epoch{'s' if info.epochs != 1 else ''}"))
    _add(table, "optimizer", _joined(info.optimizer, f"lr {info.learning_rate:.3g}", info.schedule))
    for number, text in enumerate(info.acceleration):
        _add(table, "" if number else "acceleration", text)
    if info.predicted_memory_gib is not None:
        of = f"of {gib_text(info.available_memory_gib)}" if info.available_memory_gib is not None else None
        _add(table, "memory", " ".join(filter(None, [f"{gib_text(info.predicted_memory_gib)} predicted", of])))
    _add(table, "output", str(info.output_dir))
    if info.resumed_from:
        _add(table, "resumes", info.resumed_from)
    _add_remarks(table, info.warnings, info.notes)
    return _panel(table, f"Pyralis · {info.task} · {info.mode}", "cyan")


def final_panel(info: FinalInfo) -> RenderableType:
    summary = info.summary
    table = _table()
    _add(table, "loss", f"{loss_text(summary.first_loss)} → {loss_text(summary.last_loss)}")
    if summary.last_eval_loss is not None:
        change = _change(loss_text(summary.first_eval_loss), loss_text(summary.last_eval_loss))
        best = f"lowest {loss_text(summary.best_eval_loss)} at step {summary.best_eval_step}"
        several = summary.best_eval_step is not None and "→" in change
        _add(table, "eval loss", _joined(change, best if several else None))
    if (rewards := summary.rewards) is not None:
        right = f"{_change(percent_text(rewards.first_accuracy), percent_text(rewards.last_accuracy))} right"
        margin = f"margin {_change(f'{rewards.first_margin:.3g}', f'{rewards.last_margin:.3g}')}"
        _add(table, "rewards", _joined(right, margin, "on the evaluation data" if rewards.evaluated else None))
    _add(table, "time", _joined(duration_text(summary.seconds), number_of(summary.steps, "step")))
    if summary.supervised_tokens_per_second is not None and summary.total_tokens_per_second is not None:
        supervised = f"{count_text(summary.supervised_tokens_per_second)} supervised tokens/s"
        _add(table, "speed", _joined(supervised, f"{count_text(summary.total_tokens_per_second)} tokens/s in all"))
    if summary.peak_memory_gib is not None:
        _add(table, "memory", f"{gib_text(summary.peak_memory_gib)} peak on the GPU")
    elif summary.peak_host_memory_gib is not None:
        _add(table, "memory", f"{gib_text(summary.peak_host_memory_gib)} peak of the process")
    if summary.skipped:
        _add(table, "left out", f"{number_of(len(summary.skipped), 'step')} whose loss or gradient was not finite")
    if summary.spikes:
        at = ", ".join(str(event.step) for event in summary.spikes[:5]) + (", ..." if len(summary.spikes) > 5 else "")
        _add(table, "spikes", f"{number_of(len(summary.spikes), 'step')} with a loss far above those before: {at}")
    _add(table, "", "")
    paths = (("result", info.result_dir), ("metrics", info.metrics), ("picture", info.picture), ("report", info.report))
    for name, path in paths:
        if path is not None:
            _add(table, name, str(path))
    _add_remarks(table, info.warnings, info.notes)
    parts: list[RenderableType] = [
        Text(summary.verdict.english, f"bold {MOOD_STYLE[summary.verdict.mood]}"),
        Text(),
        table,
    ]
    if info.next_commands:
        parts += [Text(), Text("Next", "bold")]
        for command, purpose in info.next_commands:
            # padded, not indented: a long command goes on below its own beginning
            parts += [Padding(Text(command, "cyan", overflow="fold"), (0, 0, 0, 2))]
            parts += [Padding(Text(purpose, "dim"), (0, 0, 0, 6))]
    return _panel(Group(*parts), "Pyralis · done", MOOD_STYLE[summary.verdict.mood])


def _change(first: str, last: str) -> str:
    """first → last, or the one value of a run that was evaluated once."""
    return last if first == last else f"{first} → {last}"


def _batch_text(info: StartupInfo) -> Text:
    effective = info.micro_batch_size * info.grad_accum_steps * info.world_size
    product = f"{info.micro_batch_size} x {info.grad_accum_steps} accumulated"
    if info.world_size > 1:
        product += f" x {info.world_size} processes"
    length = f"up to {info.max_seq_length:,} tokens each" if info.max_seq_length else None
    return _joined(f"{product} = {number_of(effective, 'row')} a step", length)


def _add(table: Table, name: str | Text, value: str | Text) -> None:
    """A row; a plain string stays as it is, where rich would read [brackets] as markup."""
    table.add_row(name, Text(value) if isinstance(value, str) else value)


def _add_remarks(table: Table, warnings: Sequence[str], notes: Sequence[str]) -> None:
    for text in warnings:
        _add(table, Text("warning", "bold yellow"), Text(text, "yellow"))
    for text in notes:
        _add(table, Text("note", "dim"), Text(text, "dim"))


def _joined(*parts: str | Text | None) -> Text:
    return Text(" · ", "dim").join(Text(p) if isinstance(p, str) else p for p in parts if p)


def _table() -> Table:
    table = Table.grid(padding=(0, 2))
    table.add_column(style="dim", no_wrap=True)
    table.add_column(overflow="fold")
    return table


def _panel(body: RenderableType, title: str, style: str) -> Panel:
    return Panel(body, title=Text(title), title_align="left", border_style=style, box=box.ROUNDED, padding=(0, 1))
