"""What is measured, through a real Trainer, and the file it is kept in."""

from __future__ import annotations

import json
import math
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import PrinterCallback

from pyralis.errors import DataError
from pyralis.train.report.metric_rows import from_json, to_json
from pyralis.train.report.metrics import (
    EvalMetrics,
    Metric,
    MetricsCallback,
    MetricsWriter,
    RunEvent,
    StepMetrics,
    peak_memory_gib,
    read_metrics,
)


class Line(nn.Module):
    """y = w x, with the loss of every training step kept."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))
        self.losses: list[float] = []

    def forward(self, x: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
        loss = (self.weight * x - labels).square().mean()
        if self.training:
            self.losses.append(loss.item())
        return {"loss": loss}


def train(
    folder: Path,
    *,
    resume_step: int | None = None,
    callbacks: list[TrainerCallback] | None = None,
    resume_from_checkpoint: str | None = None,
    **settings: Any,
) -> tuple[Line, list[Metric]]:
    """Run HF's Trainer over ten rows; the file's rows come back. 3 of 7 tokens a step are supervised."""
    model, rows = Line(), [{"x": torch.tensor(float(i)), "labels": torch.tensor(2.0 * i)} for i in range(10)]
    arguments: dict[str, Any] = {
        "output_dir": str(folder), "report_to": "none", "use_cpu": True, "disable_tqdm": True, "logging_steps": 100,
        "save_strategy": "no", "per_device_train_batch_size": 2, "num_train_epochs": 1, "learning_rate": 1e-3,
    }  # fmt: skip
    writer = MetricsWriter(folder / "metrics.jsonl", resume_step)
    trainer = Trainer(model, TrainingArguments(**(arguments | settings)), train_dataset=rows, eval_dataset=rows)
    metrics = MetricsCallback(writer, lambda: (3 * trainer.state.global_step, 7 * trainer.state.global_step))
    trainer.remove_callback(PrinterCallback)
    for callback in (metrics, *(callbacks or [])):
        trainer.add_callback(callback)
    trainer.train(resume_from_checkpoint=resume_from_checkpoint)
    writer.close()
    assert metrics.history == read_metrics(writer.path)
    return model, metrics.history


def steps_of(metrics: list[Metric]) -> list[StepMetrics]:
    return [m for m in metrics if isinstance(m, StepMetrics)]


def test_a_run_shorter_than_logging_steps_has_its_first_and_last_step(tmp_path: Path) -> None:
    model, metrics = train(tmp_path)
    first, last = steps_of(metrics)
    assert (first.step, first.window_steps, last.step, last.window_steps) == (1, 1, 5, 4)
    assert first.loss == pytest.approx(model.losses[0])
    assert last.loss == pytest.approx(sum(model.losses[1:]) / 4)
    assert (last.supervised_tokens, last.total_tokens, last.epoch) == (15, 35, 1.0)
    assert last.total_tokens_per_second == pytest.approx(last.supervised_tokens_per_second * 7 / 3)
    assert last.learning_rate < first.learning_rate
    assert first.grad_norm is not None
    assert [m.event for m in metrics if isinstance(m, RunEvent)] == ["start", "end"]


@pytest.mark.parametrize("strategy", ["no", "epoch"])
def test_first_and_last_step_with_other_logging_strategies(tmp_path: Path, strategy: str) -> None:
    _, metrics = train(tmp_path, logging_strategy=strategy, num_train_epochs=2)
    logged = [m.step for m in steps_of(metrics)]
    assert logged == ([1, 10] if strategy == "no" else [1, 5, 10])


def test_a_run_stopped_early_has_its_last_step(tmp_path: Path) -> None:
    class Stop(TrainerCallback):
        def on_step_end(self, args: Any, state: TrainerState, control: TrainerControl, **_: Any) -> None:
            control.should_training_stop = state.global_step == 3

    _, metrics = train(tmp_path, callbacks=[Stop()])
    assert [m.step for m in steps_of(metrics)] == [1, 3]


def test_evaluation_and_saving_are_recorded_and_kept_out_of_the_rates(tmp_path: Path) -> None:
    class SlowEvaluation(TrainerCallback):
        def on_prediction_step(self, *_: Any, **__: Any) -> None:
            time.sleep(0.1)

    _, metrics = train(
        tmp_path,
        callbacks=[SlowEvaluation()],
        logging_steps=2,
        eval_strategy="steps",
        eval_steps=2,
        save_strategy="steps",
        save_steps=4,
    )
    evaluated = [m for m in metrics if isinstance(m, EvalMetrics)]
    assert [m.step for m in evaluated] == [2, 4, 5]
    assert all(m.perplexity == pytest.approx(math.exp(m.loss)) for m in evaluated)
    assert all(m.seconds is not None and m.seconds >= 0.2 for m in evaluated)
    fourth = next(m for m in steps_of(metrics) if m.step == 4)
    assert fourth.elapsed_seconds > 0.2  # the evaluation at step 2 took at least as long ...
    assert 14 / fourth.total_tokens_per_second < 0.1  # ... but is not in the window of steps 3 and 4
    assert [m.step for m in metrics if isinstance(m, RunEvent) and m.event == "checkpoint"] == [4, 5]


def test_a_resumed_run_goes_on_from_its_checkpoint(tmp_path: Path) -> None:
    settings: dict[str, Any] = {"logging_steps": 1, "save_strategy": "steps", "save_steps": 2}
    _, before = train(tmp_path, **settings)
    # A counter that starts at the resumed step, as the trainer's does.
    _, after = train(tmp_path, resume_step=2, resume_from_checkpoint=str(tmp_path / "checkpoint-2"), **settings)
    assert [m.step for m in steps_of(after)] == [1, 2, 3, 4, 5]
    assert after[: len(steps_of(after)) - 1] == before[: len(steps_of(after)) - 1]
    resumed = next(m for m in after if isinstance(m, RunEvent) and m.event == "resume")
    assert (resumed.step, resumed.supervised_tokens) == (2, 6)
    elapsed = [m.elapsed_seconds for m in after if not isinstance(m, EvalMetrics)]
    assert elapsed == sorted(elapsed)
    assert [m.loss for m in steps_of(after)] == pytest.approx([m.loss for m in steps_of(before)])


def test_a_new_run_keeps_an_older_file(tmp_path: Path) -> None:
    path = tmp_path / "run" / "metrics.jsonl"
    for step in (1, 2, 3):
        writer = MetricsWriter(path)
        writer.write(RunEvent("start", step, 0, 0, 0.0))
        writer.close()
    steps = [
        read_metrics(path.with_name(name))[0].step for name in ("metrics.1.jsonl", "metrics.2.jsonl", "metrics.jsonl")
    ]
    assert steps == [1, 2, 3]


def test_rows_are_on_disk_at_once_and_each_is_valid_json(tmp_path: Path, make_step: Any) -> None:
    path = tmp_path / "metrics.jsonl"
    writer = MetricsWriter(path)
    writer.write(make_step(1, math.nan, grad_norm=math.inf))
    row = json.loads(path.read_text(encoding="utf-8"), parse_constant=pytest.fail)
    assert (row["kind"], row["loss"], row["grad_norm"]) == ("train", None, None)
    assert row["not_finite"] == {"loss": "nan", "grad_norm": "inf"}
    read = read_metrics(path)[0]
    assert isinstance(read, StepMetrics)
    assert math.isnan(read.loss)
    assert read.grad_norm == math.inf
    writer.close()


def test_every_kind_comes_back(history: list[Metric]) -> None:
    assert [from_json(to_json(metric)) for metric in history] == history


def test_a_half_written_last_line_is_left_out_and_removed_on_resuming(tmp_path: Path, make_step: Any) -> None:
    path = tmp_path / "metrics.jsonl"
    rows = [make_step(step, 1.0) for step in (1, 2, 3)]
    lines = [to_json(row) for row in rows]
    path.write_text("\n".join(lines[:2]) + "\n" + lines[2][:40], encoding="utf-8")
    assert read_metrics(path) == rows[:2]
    writer = MetricsWriter(path, resume_step=3)
    writer.write(rows[2])
    writer.close()
    assert read_metrics(path) == rows
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    "line",
    [
        *('{"kind": "train", "step": ', "[]", '{"kind": "other"}', '{"kind": "eval", "step": 1}', "[" * 50_000),
        *('{"kind": "eval", "step": "x", "epoch": 1, "loss": 1}', '{"kind": "eval", "not_finite": [1]}'),
    ],
)
def test_a_broken_line_in_the_middle_is_named(tmp_path: Path, make_step: Any, line: str) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text(f"{to_json(make_step(1, 1.0))}\n{line}\n{to_json(make_step(2, 1.0))}\n", encoding="utf-8")
    with pytest.raises(DataError, match=r"metrics\.jsonl:2: not a row of metrics"):
        read_metrics(path)


def test_other_ranks_measure_without_writing() -> None:
    metrics = MetricsCallback(None, lambda: (0, 0))
    metrics.record_event("interrupted", "Ctrl-C")
    assert [(m.event, m.message) for m in metrics.history if isinstance(m, RunEvent)] == [("interrupted", "Ctrl-C")]


def test_peak_memory_is_of_the_gpu_or_else_of_the_process() -> None:
    device, host = peak_memory_gib()
    assert (device is None) != (host is None)
    assert 0 < (device or host or 0) < 10_000
