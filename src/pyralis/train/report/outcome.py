"""What a run leaves for people: the facts for both panels, the picture and the report."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from datasets import Dataset

from pyralis.data.preview import ShownRow
from pyralis.data.report import DataReport
from pyralis.data.stats import Batching, BatchStats
from pyralis.memory.explain import memory_rows
from pyralis.memory.gpus import GIB
from pyralis.train.checkpoints.checkpoint import StartPoint
from pyralis.train.config.train_config import TrainConfig
from pyralis.train.predicted_memory import Prediction
from pyralis.train.report.environment import code_commits, describe_environment
from pyralis.train.report.format import loss_text, number_of
from pyralis.train.report.language import words
from pyralis.train.report.memory_table import MemoryTable
from pyralis.train.report.metric_rows import EvalMetrics, Metric
from pyralis.train.report.panel import DataLine, FinalInfo, StartupInfo
from pyralis.train.report.part_shares import waiting_note
from pyralis.train.report.plot import plot_loss
from pyralis.train.report.reproduction import reproduction
from pyralis.train.report.run_report import (
    DataSummary,
    DroppedRows,
    ReportInfo,
    SampleAnswer,
    write_report,
)
from pyralis.train.report.summary import RunSummary, summarise
from pyralis.train.report.svg import LengthBin
from pyralis.train.setup import PreparedData, PreparedModel, checkpoints_layers

if TYPE_CHECKING:
    from pyralis.train.trainer import PyralisTrainer

PICTURE_NAME, REPORT_NAME = "loss.png", "report.html"


@dataclass(frozen=True, slots=True)
class OutcomeFiles:
    """Paths of what was written; None for what was not."""

    metrics: Path | None = None
    picture: Path | None = None
    report: Path | None = None


def describe_start(
    config: TrainConfig,
    prepared: PreparedData,
    model: PreparedModel,
    trainer: PyralisTrainer,
    start: StartPoint,
    notes: Sequence[str],
    predicted: Prediction,
) -> StartupInfo:
    report = prepared.data.report
    data = [DataLine("train", report.sequences, report.tokens, report.supervised_tokens)]
    if report.eval is not None:
        data.append(DataLine("eval", report.eval.sequences, report.eval.tokens, report.eval.supervised_tokens))
    arguments = trainer.args
    batching = Batching.of(arguments, arguments.world_size)
    rows = prepared.data.train
    steps, epochs = batching.steps(len(rows) if isinstance(rows, Dataset) else batching.rows)
    memory = "layers recomputed in the backward pass" if checkpoints_layers(config, model.loaded.device) else ""
    plan = predicted.plan
    return StartupInfo(
        model=config.model_name_or_path,
        architecture=str(getattr(model.loaded.model.config, "model_type", "")),
        parameters=model.parameters.total,
        trainable_parameters=model.parameters.trainable,
        task=config.task_type,
        mode=_mode_text(config, model),
        dtype=str(model.loaded.dtype).removeprefix("torch."),
        device=_device_text(model.loaded.device),
        data=data,
        micro_batch_size=arguments.per_device_train_batch_size,
        grad_accum_steps=arguments.gradient_accumulation_steps,
        world_size=arguments.world_size,
        steps=steps,
        epochs=epochs,
        optimizer=str(getattr(arguments.optim, "value", arguments.optim)),
        learning_rate=arguments.learning_rate,
        schedule=str(getattr(arguments.lr_scheduler_type, "value", arguments.lr_scheduler_type)),
        output_dir=Path(config.output_dir),
        quantization=_quantization_text(config, model),
        max_seq_length=config.max_seq_length,
        acceleration=[*model.acceleration.lines, *([memory] if memory else [])],
        predicted_memory_gib=None if plan is None else sum(size for _, size in memory_rows(plan)) / GIB,
        available_memory_gib=_gpu_gib(model.loaded.device),
        unpredicted=predicted.reason,
        resumed_from=str(start.checkpoint) if start.checkpoint else None,
        notes=[*notes, *start.notes, *model.loaded.notes],
        warnings=[*report.warnings, *model.notes],
    )


def _mode_text(config: TrainConfig, model: PreparedModel) -> str:
    if config.train_mode == "full":
        return "full"
    name = "QLoRA" if config.train_mode == "qlora" else "LoRA"
    lora = model.model.peft_config[model.model.active_adapter]  # load_adapter brings its own settings
    kind = "DoRA, " if lora.use_dora else "rsLoRA, " if lora.use_rslora else ""
    dropout = 0.0 if config.task_type == "dpo" else lora.lora_dropout  # the reference has none
    return f"{name} ({kind}rank {lora.r}, alpha {lora.lora_alpha:g}, dropout {dropout:g})"


def _quantization_text(config: TrainConfig, model: PreparedModel) -> str | None:
    if not model.loaded.quantized:
        return None
    if config.train_mode != "qlora":
        return "quantised checkpoint"
    return f"{config.quant_type.upper()} weights" + (", double quantisation" if config.double_quant else "")


def _gpu_gib(device: torch.device) -> float | None:
    return torch.cuda.get_device_properties(device).total_memory / GIB if device.type == "cuda" else None


def _device_text(device: torch.device) -> str:
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        return f"{properties.name}, {properties.total_memory / GIB:.0f} GiB"
    return f"CPU, {number_of(torch.get_num_threads(), 'thread')}"


def write_outcome(
    output_dir: Path,
    info: StartupInfo,
    metrics: Sequence[Metric],
    effective: Mapping[str, Any],
    data: DataReport,
    batches: BatchStats | None,
    samples: Sequence[SampleAnswer],
    notes: Sequence[str] = (),
    *,
    memory: MemoryTable | None = None,
    examples: Sequence[ShownRow] = (),
) -> OutcomeFiles:
    """Draw `loss.png` and write `report.html` into the output folder. notes: beside those of `info`."""
    plot_loss(metrics, output_dir / PICTURE_NAME, title=Path(info.model).name)
    write_report(
        output_dir / REPORT_NAME,
        ReportInfo(
            startup=info,
            metrics=metrics,
            config=effective,
            environment=describe_environment(),
            data=DataSummary(
                files=[file.file for file in data.files],
                rows_read=data.rows_read,
                rows_kept=data.rows_kept,
                truncated_rows=data.truncated,
                dropped=[DroppedRows(d.reason, d.rows, d.examples) for d in data.dropped],
                lengths=_length_bins(data.length_histogram),
                split_rows=data.split,
                pieces=data.pieces,
                tokens_lost=data.tokens_lost,
                duplicates=data.duplicates,
                shared=0 if data.eval is None else data.eval.shared,
                packed_fill=data.packed_fill,
                batches=batches,
                examples=examples,
            ),
            reproduction=reproduction(output_dir, effective),
            memory=memory,
            samples=samples,
            notes=notes,
            title=Path(info.model).name,
        ),
    )
    return OutcomeFiles(output_dir / "metrics.jsonl", output_dir / PICTURE_NAME, output_dir / REPORT_NAME)


def _length_bins(histogram: Sequence[tuple[int, int]]) -> list[LengthBin]:
    """Bins with both edges, from (upper edge, examples)."""
    uppers = [upper for upper, _ in histogram]
    return [LengthBin(start, end, count) for start, (end, count) in zip([0, *uppers], histogram)]


def final_info(
    config: TrainConfig,
    summary: RunSummary,
    files: OutcomeFiles,
    interrupted: bool,
    samples: Sequence[SampleAnswer],
    next_commands: Sequence[tuple[str, str]] | None,
    notes: Sequence[str] = (),
) -> FinalInfo:
    folder = config.output_dir
    if interrupted:
        again = words("the same command again", "再次运行同一命令")
        commands: Sequence[tuple[str, str]] = (
            (again, words("goes on from the checkpoint just saved", "从刚保存的检查点继续")),
        )
    elif next_commands is not None:
        commands = next_commands
    else:
        commands = [(f"pyralis chat {folder}", words("talk to it", "与它对话"))]
        if config.train_mode != "full":
            purpose = words("one folder any program loads", "任何程序都能加载的一个文件夹")
            commands.append((f"pyralis export merge {folder} {folder}-merged", purpose))
    return FinalInfo(
        summary=summary,
        result_dir=Path(folder),
        metrics=files.metrics,
        picture=files.picture,
        report=files.report,
        next_commands=commands,
        notes=notes,
    )


def result_notes(best_step: int | None, metrics: Sequence[Metric]) -> list[str]:
    """best_step: the step whose model is the result, where that is not the last one."""
    waiting = waiting_note(summarise(metrics))
    notes = [] if waiting is None else [waiting]
    if best_step is None:
        return notes
    loss = next((m.loss for m in metrics if isinstance(m, EvalMetrics) and m.step == best_step), None)
    return [
        *notes,
        f"the result is the model of step {best_step}, whose evaluation loss was the lowest ({loss_text(loss)}): "
        "load_best_model_at_end",
    ]


def run_facts(status: str, config: TrainConfig, prepared: PreparedData, model: PreparedModel) -> dict[str, Any]:
    """`pyralis_run.json`: whether the run is over, what it learns from, and how it computes (merging must know)."""
    return {
        "status": status,
        "step": 0,
        "compute_dtype": str(model.loaded.dtype).removeprefix("torch."),
        "rope_scaled_to": model.loaded.rope_scaled_to,
        "model_type": model.loaded.model.config.model_type,
        "seed": config.seed,
        "data_digest": prepared.data.digest,
        "device": _device_text(model.loaded.device),
        "commits": code_commits(),
        "versions": dict(describe_environment().packages),
    }


def summary_facts(summary: RunSummary) -> dict[str, Any]:
    names = ("first_loss", "last_loss", "last_eval_loss", "seconds", "supervised_tokens", "total_tokens")
    return {name: getattr(summary, name) for name in names} | {"seconds_by_part": dict(summary.seconds_by_part)}
