"""A run in a few sentences, for the top of its report."""

from __future__ import annotations

from pathlib import PurePath

from pyralis.train.report.format import count_text, duration_text, gib_text, number_of, percent_text
from pyralis.train.report.panel import StartupInfo
from pyralis.train.report.part_shares import part_shares
from pyralis.train.report.summary import RunSummary

TASKS = {
    "sft": ("answers", "回答"),
    "pretrain": ("texts", "文本"),
    "dpo": ("pairs of answers", "回答对"),
}


def run_in_words(run: StartupInfo, summary: RunSummary) -> tuple[str, str]:
    """(English, Chinese): what was trained on what, for how long, and what it took."""
    train = next((line for line in run.data if line.name == "train"), None)
    model = PurePath(run.model).name
    task, task_chinese = TASKS.get(run.task, (run.task, run.task))
    rows = 0 if train is None else train.rows
    english = [
        f"{model} was trained on {number_of(rows, 'row')} of {task}, by {run.mode}: "
        f"{count_text(run.trainable_parameters)} of {count_text(run.parameters)} parameters, "
        f"{number_of(summary.steps, 'step')}, {summary.epochs:.3g} epochs, "
        f"{count_text(summary.total_tokens)} tokens, {count_text(summary.supervised_tokens)} of them learnt."
    ]
    chinese = [
        f"{model} 在 {rows:,} 行{task_chinese}上以 {run.mode} 训练：共 {count_text(run.parameters)} 参数，训练其中 "
        f"{count_text(run.trainable_parameters)}；{summary.steps:,} 步，{summary.epochs:.3g} 轮，"
        f"{count_text(summary.total_tokens)} 词元，其中 {count_text(summary.supervised_tokens)} 参与监督。"
    ]
    shares = {share.part: share for share in part_shares(summary)}
    took, took_chinese = f"It took {duration_text(summary.seconds)}", f"用时 {duration_text(summary.seconds)}"
    if (compute := shares.get("compute")) is not None:
        took += f", {percent_text(compute.share)} of it in forward and backward"
        took_chinese += f"，其中前向与反向占 {percent_text(compute.share)}"
    if (peak := summary.peak_memory_gib) is not None:
        took += f", and {gib_text(peak)} of GPU memory at the peak"
        took_chinese += f"；显存峰值 {gib_text(peak)}"
    elif (peak := summary.peak_host_memory_gib) is not None:
        took += f", and the process {gib_text(peak)} of memory at the peak"
        took_chinese += f"；进程内存峰值 {gib_text(peak)}"
    return " ".join([*english, f"{took}."]), "".join([*chinese, f"{took_chinese}。"])
