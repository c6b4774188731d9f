"""Runs beside each other: read from their folders, their figures, and what their configs differ in."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pyralis.errors import DataError
from pyralis.train.checkpoints.checkpoint import CONFIG_NAME, read_object, run_record
from pyralis.train.report.format import count_text, duration_text, gib_text, loss_text
from pyralis.train.report.language import words
from pyralis.train.report.metric_rows import METRICS_NAME, Metric, StepMetrics, read_metrics
from pyralis.train.report.page import value_text
from pyralis.train.report.summary import RunSummary, summarise

MISSING = "-"
_NOT_COMPARED = frozenset({"output_dir", "run_name"})  # names of a run, which always differ
_FACTS = ("compute_dtype", "data_digest")


@dataclass(frozen=True, slots=True)
class Run:
    """A run's folder, read. `settings`: its effective config, with `compute_dtype`, `data_digest` and
    `versions.PACKAGE` from its record."""

    name: str
    folder: Path
    status: str
    metrics: Sequence[Metric]
    summary: RunSummary
    settings: Mapping[str, Any]

    @property
    def lowest_loss(self) -> float | None:
        """Of the logged ones of training."""
        losses = (m.loss for m in self.metrics if isinstance(m, StepMetrics))
        return min((loss for loss in losses if math.isfinite(loss)), default=None)


@dataclass(frozen=True, slots=True)
class Figure:
    """One row of a comparison. better: which end is the good one; None: neither."""

    english: str
    chinese: str
    text: Callable[[Run], str]
    value: Callable[[Run], float | None] = lambda run: None
    better: Literal["low", "high"] | None = None

    def best(self, runs: Sequence[Run]) -> set[int]:
        """Indices of the runs that are best in it, as far as their texts tell; none where all are alike."""
        values = {i: v for i, run in enumerate(runs) if (v := self.value(run)) is not None and math.isfinite(v)}
        texts = {i: self.text(runs[i]) for i in values}
        if self.better is None or len(set(texts.values())) < 2:
            return set()
        goal = texts[(min if self.better == "low" else max)(values, key=lambda i: values[i])]
        return {i for i, text in texts.items() if text == goal}


@dataclass(frozen=True, slots=True)
class Difference:
    """A setting that is not the same in all runs, as text, one a run."""

    name: str
    values: tuple[str, ...]


_EXPECTED = "the output_dir of a `pyralis train`"
_STATUS_CHINESE = {"finished": "完成", "interrupted": "已中断", "stopped": "因异常停止", "unfinished": "未完成"}


def _memory(run: Run) -> float | None:
    device = run.summary.peak_memory_gib
    return run.summary.peak_host_memory_gib if device is None else device


def _rate(rate: float | None) -> str:
    return MISSING if rate is None else count_text(rate)


def _lowest_eval(run: Run) -> str:
    step = run.summary.best_eval_step
    return MISSING if step is None else f"{loss_text(run.summary.best_eval_loss)} @ {step:,}"


FIGURES = (
    Figure("status", "状态", lambda run: words(run.status, _STATUS_CHINESE[run.status])),
    Figure("steps", "步数", lambda run: f"{run.summary.steps:,}"),
    Figure("loss", "损失", lambda run: loss_text(run.summary.last_loss), lambda run: run.summary.last_loss, "low"),
    Figure("lowest loss", "最低损失", lambda run: loss_text(run.lowest_loss), lambda run: run.lowest_loss, "low"),
    Figure(
        *("eval loss", "评估损失", lambda run: loss_text(run.summary.last_eval_loss)),
        *(lambda run: run.summary.last_eval_loss, "low"),
    ),
    Figure("lowest eval loss", "最低评估损失", _lowest_eval, lambda run: run.summary.best_eval_loss, "low"),
    Figure(
        *("tokens/s", "词元/秒", lambda run: _rate(run.summary.total_tokens_per_second)),
        *(lambda run: run.summary.total_tokens_per_second, "high"),
    ),
    Figure(
        *("supervised tokens/s", "监督词元/秒", lambda run: _rate(run.summary.supervised_tokens_per_second)),
        *(lambda run: run.summary.supervised_tokens_per_second, "high"),
    ),
    Figure("tokens", "词元总数", lambda run: count_text(run.summary.total_tokens)),
    Figure("peak memory", "内存峰值", lambda run: gib_text(_memory(run)), _memory, "low"),
    Figure("time", "用时", lambda run: duration_text(run.summary.seconds)),
)
"""What a comparison shows of each run, in this order."""


def status_words(run: Run) -> tuple[str, str]:
    """(English, Chinese)"""
    return run.status, _STATUS_CHINESE[run.status]


def read_runs(folders: Sequence[str | Path]) -> list[Run]:
    """The runs in these folders, in order, a folder that comes twice once.

    Raises:
        DataError: a folder that holds no run; the message says what lies there instead.
        ConfigError: a run whose record is damaged.
    """
    given = list(dict.fromkeys(Path(os.path.abspath(Path(folder).expanduser())) for folder in folders))
    return [_read_run(folder, name) for folder, name in zip(given, _names(given))]


def differences(runs: Sequence[Run]) -> list[Difference]:
    """The settings that are not the same in all runs, in the order of the configs; those of the machine last."""
    names = dict.fromkeys(name for run in runs for name in run.settings if name not in _NOT_COMPARED)
    found = []
    for name in sorted(names, key=lambda name: name in _FACTS or name.startswith("versions.")):
        values = tuple(value_text(run.settings[name]) if name in run.settings else MISSING for run in runs)
        if len(set(values)) > 1:
            found.append(Difference(name, values))
    return found


def _read_run(folder: Path, name: str) -> Run:
    if not folder.is_dir():
        raise DataError(f"{folder} {'is a file' if folder.exists() else 'does not exist'}; expected {_EXPECTED}.")
    if not (folder / METRICS_NAME).is_file():
        raise DataError(f"{folder} holds no run (no {METRICS_NAME} in it); expected {_EXPECTED}.{_hint(folder)}")
    metrics = read_metrics(folder / METRICS_NAME)
    if not any(isinstance(m, StepMetrics) for m in metrics):
        raise DataError(f"{folder}: this run has not logged a step yet, so there is nothing to compare.")
    config = read_object(folder / CONFIG_NAME) if (folder / CONFIG_NAME).is_file() else {}
    record = run_record(folder)
    facts = {name: record[name] for name in _FACTS if name in record}
    if "data_digest" in facts:
        facts["data_digest"] = str(facts["data_digest"])[:12]
    noted = record.get("versions")
    versions = {f"versions.{name}": version for name, version in noted.items()} if isinstance(noted, dict) else {}
    status = str(record.get("status"))
    status = status if status in _STATUS_CHINESE else "unfinished"  # "running", or killed
    return Run(name, folder, status, metrics, summarise(metrics), {**config, **facts, **versions})


def _hint(folder: Path) -> str:
    """Runs nearby that may have been meant."""
    if (folder.parent / METRICS_NAME).is_file():
        return f" Did you mean {folder.parent}, the run that it belongs to?"
    inside = sorted(path.parent.name for path in folder.glob(f"*/{METRICS_NAME}"))
    if not inside:
        return ""
    more = ", ..." if len(inside) > 5 else ""
    return f" There are runs inside of it: {', '.join(inside[:5])}{more}."


def _names(folders: Sequence[Path]) -> list[str]:
    """The shortest ends of the paths that tell them apart."""
    length = 1
    while len({folder.parts[-length:] for folder in folders}) < len(folders):
        length += 1
    return ["/".join(folder.parts[-length:]) for folder in folders]
