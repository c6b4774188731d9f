"""The panels at the beginning and the end of a run. They read the same without colours and at 80 columns, and are in
Chinese where the locale is; warnings and notes stay as they are."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rich import box
from rich.console import Group, RenderableType
from rich.padding import Padding
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from pyralis.train.report.format import count_text, duration_text, gib_text, loss_text, number_of, percent_text
from pyralis.train.report.language import words
from pyralis.train.report.part_shares import parts_text
from pyralis.train.report.summary import RunSummary

_FACTS = (
    (r"^CPU, (\d+) threads?$", r"CPU，\1 线程"),
    (r"^(\d+) of (\d+) layers fast$", r"\2 层中 \1 层已加速"),
    (r"^layers recomputed in the backward pass$", "各层在反向传播中重新计算"),
)
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
    """What is about to be trained. Memory is per GPU in GiB; None where it is not known.

    unpredicted: why nothing is predicted, on a GPU.
    """

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
    unpredicted: str | None = None
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
    _add(table, words("model", "模型"), _joined(Text(info.model, "bold"), info.architecture))
    share = percent_text(info.trainable_parameters / max(info.parameters, 1))
    trained, total = count_text(info.trainable_parameters), count_text(info.parameters)
    trains = words(f"{trained} of {total} parameters ({share})", f"{total} 参数中的 {trained}（{share}）")
    _add(table, words("trains", "训练"), _joined(trains, info.mode, info.dtype, info.quantization))
    _add(table, words("device", "设备"), words(info.device, _chinese(info.device)))
    for line in info.data:
        supervised = percent_text(line.supervised_tokens / max(line.tokens, 1))
        tokens = count_text(line.tokens)
        counted = words(
            f"{tokens} tokens, {supervised} of them supervised", f"{tokens} 词元，其中 {supervised} 参与监督"
        )
        name = words(f"{line.name} data", {"train": "训练数据", "eval": "评估数据"}.get(line.name, line.name))
        _add(table, name, _joined(_number_of(line.rows, "row", "行"), counted))
    _add(table, words("batch", "批次"), _batch_text(info))
    epochs = words(f"{info.epochs:g} epoch{'s' if info.epochs != 1 else ''}", f"{info.epochs:g} 轮")
    _add(table, words("steps", "步数"), _joined(f"{info.steps:,}", epochs))
    rate = f"{words('lr', '学习率')} {info.learning_rate:.3g}"
    _add(table, words("optimizer", "优化器"), _joined(info.optimizer, rate, info.schedule))
    for number, text in enumerate(info.acceleration):
        _add(table, "" if number else words("acceleration", "加速"), words(text, _chinese(text)))
    there = info.available_memory_gib
    if info.predicted_memory_gib is not None:
        predicted = gib_text(info.predicted_memory_gib)
        of = "" if there is None else words(f" of {gib_text(there)}", f"，共 {gib_text(there)}")
        _add(table, words("memory", "显存"), words(f"{predicted} predicted", f"预计 {predicted}") + of)
    elif info.unpredicted is not None:
        why = words(f"not predicted: {info.unpredicted}", f"无法预计：{info.unpredicted}")
        _add(table, words("memory", "显存"), _joined(None if there is None else gib_text(there), why))
    _add(table, words("output", "输出"), str(info.output_dir))
    if info.resumed_from:
        _add(table, words("resumes", "续训自"), info.resumed_from)
    _add_remarks(table, info.warnings, info.notes)
    kind = info.mode.partition(" (")[0]
    return _panel(table, f"Pyralis · {info.task} · {kind}", "cyan")


def final_panel(info: FinalInfo) -> RenderableType:
    summary = info.summary
    table = _table()
    _add(table, words("loss", "损失"), f"{loss_text(summary.first_loss)} → {loss_text(summary.last_loss)}")
    if summary.last_eval_loss is not None:
        change = _change(loss_text(summary.first_eval_loss), loss_text(summary.last_eval_loss))
        lowest, step = loss_text(summary.best_eval_loss), summary.best_eval_step
        best = words(f"lowest {lowest} at step {step}", f"第 {step} 步最低 {lowest}")
        several = summary.best_eval_step is not None and "→" in change
        _add(table, words("eval loss", "评估损失"), _joined(change, best if several else None))
    if (rewards := summary.rewards) is not None:
        right = f"{_change(percent_text(rewards.first_accuracy), percent_text(rewards.last_accuracy))} "
        right += words("right", "正确")
        margin = f"{words('margin', '差')} {_change(f'{rewards.first_margin:.3g}', f'{rewards.last_margin:.3g}')}"
        on = words("on the evaluation data", "在评估数据上") if rewards.evaluated else None
        _add(table, words("rewards", "奖励"), _joined(right, margin, on))
    took = _joined(duration_text(summary.seconds), _number_of(summary.steps, "step", "步"))
    _add(table, words("time", "用时"), took)
    if summary.supervised_tokens_per_second is not None and summary.total_tokens_per_second is not None:
        supervised = f"{count_text(summary.supervised_tokens_per_second)} {words('supervised tokens/s', '监督词元/秒')}"
        every = f"{count_text(summary.total_tokens_per_second)} {words('tokens/s in all', '全部词元/秒')}"
        _add(table, words("speed", "速度"), _joined(supervised, every))
    if summary.peak_memory_gib is not None:
        peak = words("peak on the GPU", "显存峰值")
        _add(table, words("memory", "内存"), f"{gib_text(summary.peak_memory_gib)} {peak}")
    elif summary.peak_host_memory_gib is not None:
        peak = words("peak of the process", "进程内存峰值")
        _add(table, words("memory", "内存"), f"{gib_text(summary.peak_host_memory_gib)} {peak}")
    if summary.seconds_by_part:
        _add(table, words("spent on", "时间分布"), parts_text(summary))
    if summary.skipped:
        count = _number_of(len(summary.skipped), "step", "步")
        why = words(f"{count} whose loss or gradient was not finite", f"{count}的损失或梯度不是有限值")
        _add(table, words("left out", "已跳过"), why)
    if summary.spikes:
        at = ", ".join(str(event.step) for event in summary.spikes[:5]) + (", ..." if len(summary.spikes) > 5 else "")
        count = _number_of(len(summary.spikes), "step", "步")
        where = words(f"{count} with a loss far above those before: {at}", f"{count}的损失远高于之前：{at}")
        _add(table, words("spikes", "突增"), where)
    _add(table, "", "")
    paths = (
        *((words("result", "结果"), info.result_dir), (words("metrics", "指标"), info.metrics)),
        *((words("picture", "曲线图"), info.picture), (words("report", "报告"), info.report)),
    )
    for name, path in paths:
        if path is not None:
            _add(table, name, str(path))
    _add_remarks(table, info.warnings, info.notes)
    verdict = words(summary.verdict.english, summary.verdict.chinese)
    parts: list[RenderableType] = [Text(verdict, f"bold {MOOD_STYLE[summary.verdict.mood]}"), Text(), table]
    if info.next_commands:
        parts += [Text(), Text(words("Next", "接下来"), "bold")]
        for command, purpose in info.next_commands:
            # padded, not indented: a long command goes on below its own beginning
            parts += [Padding(Text(command, "cyan", overflow="fold"), (0, 0, 0, 2))]
            parts += [Padding(Text(purpose, "dim"), (0, 0, 0, 6))]
    return _panel(Group(*parts), words("Pyralis · done", "Pyralis · 完成"), MOOD_STYLE[summary.verdict.mood])


def _chinese(fact: str) -> str:
    """What is said of every run; reasons, like warnings, stay as they are."""
    for pattern, chinese in _FACTS:
        fact = re.sub(pattern, chinese, fact)
    return fact


def _change(first: str, last: str) -> str:
    """first → last, or the one value of a run that was evaluated once."""
    return last if first == last else f"{first} → {last}"


def _batch_text(info: StartupInfo) -> Text:
    effective = info.micro_batch_size * info.grad_accum_steps * info.world_size
    product = f"{info.micro_batch_size} x {info.grad_accum_steps} {words('accumulated', '累积')}"
    if info.world_size > 1:
        product += f" x {info.world_size} {words('processes', '进程')}"
    longest = f"{info.max_seq_length:,}" if info.max_seq_length else None
    length = words(f"up to {longest} tokens each", f"每行至多 {longest} 词元") if longest else None
    return _joined(f"{product} = {words(number_of(effective, 'row') + ' a step', f'每步 {effective:,} 行')}", length)


def _number_of(number: int, english: str, chinese: str) -> str:
    return words(number_of(number, english), f"{number:,} {chinese}")


def _add(table: Table, name: str | Text, value: str | Text) -> None:
    """A row; a plain string stays as it is, where rich would read [brackets] as markup."""
    table.add_row(name, Text(value) if isinstance(value, str) else value)


def _add_remarks(table: Table, warnings: Sequence[str], notes: Sequence[str]) -> None:
    for text in warnings:
        _add(table, Text(words("warning", "警告"), "bold yellow"), Text(text, "yellow"))
    for text in notes:
        _add(table, Text(words("note", "提示"), "dim"), Text(text, "dim"))


def _joined(*parts: str | Text | None) -> Text:
    return Text(" · ", "dim").join(Text(p) if isinstance(p, str) else p for p in parts if p)


def _table() -> Table:
    table = Table.grid(padding=(0, 2))
    table.add_column(style="dim", no_wrap=True)
    table.add_column(overflow="fold")
    return table


def _panel(body: RenderableType, title: str, style: str) -> Panel:
    return Panel(body, title=Text(title), title_align="left", border_style=style, box=box.ROUNDED, padding=(0, 1))
