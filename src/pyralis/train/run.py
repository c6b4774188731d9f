"""`train(config)`: from a config to a trained model and its report."""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from rich.console import Console
from transformers import PrinterCallback, ProgressCallback, set_seed

from pyralis.data.collate import Collator
from pyralis.data.template import install_template, save_template
from pyralis.errors import ConfigError
from pyralis.train.answers import answer_questions, answers_table
from pyralis.train.check_files import check_files
from pyralis.train.checkpoint import (
    CONFIG_NAME,
    RUN_NAME,
    StartPoint,
    find_start_point,
    prepare_output_dir,
    publish,
    write_json,
)
from pyralis.train.config import LoadedConfig, TrainConfig, config_from_dict, load_config
from pyralis.train.environment import describe_environment
from pyralis.train.interrupt import GracefulStop, StopCallback
from pyralis.train.live import LiveLine
from pyralis.train.metrics import MetricsCallback, MetricsWriter
from pyralis.train.outcome import OutcomeFiles, describe_start, final_info, write_outcome
from pyralis.train.panel import final_panel, startup_panel
from pyralis.train.report import SampleAnswer
from pyralis.train.setup import PreparedData, PreparedModel, prepare_data, prepare_model, training_arguments
from pyralis.train.summary import RunSummary, summarise
from pyralis.train.trainer import PyralisTrainer, restore_counts

logger = logging.getLogger(__name__)

METRICS_NAME = "metrics.jsonl"


@dataclass(frozen=True, slots=True)
class TrainResult:
    """What a run came to and where it lies."""

    status: Literal["finished", "interrupted"]
    output_dir: Path
    summary: RunSummary
    files: OutcomeFiles
    samples: tuple[SampleAnswer, ...]


def train(
    config: str | Path | Mapping[str, Any] | TrainConfig | LoadedConfig,
    overrides: Sequence[str] = (),
    *,
    console: Console | None = None,
    next_commands: Sequence[tuple[str, str]] | None = None,
) -> TrainResult:
    """Train as a config says.

    Everything that can fail without the model fails first: the config, the output folder, the tokenizer, the template,
    the data. Ctrl-C saves a checkpoint and returns; the same call goes on from there.

    Args:
        config: a JSON or YAML file, a dictionary, or a checked config.
        overrides: `key=value`, as on the command line. Only with a file.
        console: where panels and the live line go; the terminal by default.
        next_commands: (command, purpose) for the last panel; chat, merge and resume by default.

    Raises:
        PyralisError: anything the user can mend.
    """
    loaded = _checked(config, overrides)
    config = loaded.config
    if config.task_type == "dpo":
        raise ConfigError(
            "task_type: dpo is not trained yet: DPO comes with the next release. Its configs are checked "
            "(`pyralis train CONFIG --check`), and its data is read (`pyralis data CONFIG`)."
        )
    check_files(config)
    console = console or Console(highlight=False)
    output_dir = Path(config.output_dir)
    effective = config.effective()
    start = find_start_point(
        output_dir, effective, resume=config.resume_from_checkpoint, overwrite=config.overwrite_output_dir
    )
    set_seed(config.seed)
    with console.status("reading the data"):
        prepared = prepare_data(config)
    with console.status(f"loading {config.model_name_or_path}"):
        model = prepare_model(config)

    prepare_output_dir(output_dir, start)
    write_json(output_dir / CONFIG_NAME, effective)
    _write_status(output_dir, "running", model)
    return _run(config, loaded.notes, prepared, model, start, console, next_commands)


def _checked(config: Any, overrides: Sequence[str]) -> LoadedConfig:
    if isinstance(config, str | Path):
        return load_config(config, overrides)
    if overrides:
        raise ConfigError("overrides go with a config file; put them into the dictionary instead.")
    if isinstance(config, LoadedConfig):
        return config
    if isinstance(config, TrainConfig):
        return LoadedConfig(config, ())
    return config_from_dict(config)


def _run(
    config: TrainConfig,
    config_notes: Sequence[str],
    prepared: PreparedData,
    model: PreparedModel,
    start: StartPoint,
    console: Console,
    next_commands: Sequence[tuple[str, str]] | None,
) -> TrainResult:
    output_dir = Path(config.output_dir)
    arguments, argument_notes = training_arguments(
        config, dtype=model.loaded.dtype, device=model.loaded.device, has_eval=prepared.data.eval is not None
    )
    trainer = PyralisTrainer(
        model=model.model,
        args=arguments,
        train_dataset=prepared.data.train,
        eval_dataset=prepared.data.eval,
        data_collator=Collator.for_tokenizer(prepared.tokenizer),
        processing_class=prepared.tokenizer,
    )
    if start.checkpoint is not None:
        restore_counts(trainer, start.checkpoint)
    if prepared.template is not None:
        install_template(prepared.template, prepared.tokenizer)

    questions = list(config.sample_prompts or ()) if prepared.template is not None else []
    before = _answers(config, prepared, model, questions, console, "before")

    main = trainer.is_world_process_zero()
    writer = MetricsWriter(output_dir / METRICS_NAME, resume_step=start.step) if main else None
    counts = trainer.token_counts
    metrics = MetricsCallback(writer, lambda: (counts.supervised, counts.total))
    info = describe_start(config, prepared, model, trainer, start, [*config_notes, *argument_notes])
    trainer.remove_callback(ProgressCallback)
    trainer.remove_callback(PrinterCallback)
    trainer.add_callback(metrics)
    live = LiveLine(metrics, console)
    if main:
        trainer.add_callback(live)
        console.print(startup_panel(info))

    with GracefulStop() as stop:
        trainer.add_callback(StopCallback(stop))
        try:
            trainer.train(resume_from_checkpoint=str(start.checkpoint) if start.checkpoint else None)
        finally:
            live.close()  # after an error the Trainer calls no callback any more
    interrupted = stop.requested is not None and trainer.state.global_step < trainer.state.max_steps
    status: Literal["finished", "interrupted"] = "interrupted" if interrupted else "finished"
    if interrupted:
        metrics.record_event("interrupted", f"{stop.requested}: a checkpoint was saved")

    after = [] if interrupted else _answers(config, prepared, model, questions, console, "after")
    samples = tuple(SampleAnswer(*row) for row in zip(questions, before, after))
    if main and not interrupted:
        _save_result(trainer, prepared, output_dir)
    summary = summarise(metrics.history)
    files = OutcomeFiles(metrics=output_dir / METRICS_NAME)
    if main:
        files = write_outcome(output_dir, info, metrics.history, config.effective(), prepared.data.report, samples)
        _write_status(output_dir, status, model, step=trainer.state.global_step, summary=summary)
        if samples:
            console.print(answers_table(samples))
        console.print(final_panel(final_info(config, summary, files, interrupted, samples, next_commands)))
    trainer.accelerator.wait_for_everyone()
    return TrainResult(status, output_dir, summary, files, samples)


def _answers(
    config: TrainConfig,
    prepared: PreparedData,
    model: PreparedModel,
    questions: list[str],
    console: Console,
    when: str,
) -> list[str]:
    if not questions or prepared.template is None:
        return []
    with console.status(f"answering the sample questions {when} training"):
        return answer_questions(
            model.model,
            prepared.tokenizer,
            prepared.template,
            questions,
            max_new_tokens=config.sample_max_new_tokens,
        )


def _save_result(trainer: PyralisTrainer, prepared: PreparedData, output_dir: Path) -> None:
    """Adapter or model, tokenizer and template: written into a folder beside, then moved in."""
    staging = output_dir / ".saving-result"
    shutil.rmtree(staging, ignore_errors=True)
    trainer.save_model(str(staging))
    (staging / "training_args.bin").unlink(missing_ok=True)  # a pickle; pyralis_config.json says it all
    if prepared.template is not None:
        save_template(prepared.template, staging)
    publish(staging, output_dir)


def _write_status(
    output_dir: Path, status: str, model: PreparedModel, *, step: int = 0, summary: RunSummary | None = None
) -> None:
    """`pyralis_run.json`: whether the run is over, and what merging must know of how it computed."""
    if int(os.environ.get("RANK", "0")) != 0:
        return
    environment = describe_environment()
    record: dict[str, Any] = {
        "status": status,
        "step": step,
        "compute_dtype": str(model.loaded.dtype).removeprefix("torch."),
        "versions": dict(environment.packages),
    }
    if summary is not None:
        record |= {
            "first_loss": summary.first_loss,
            "last_loss": summary.last_loss,
            "last_eval_loss": summary.last_eval_loss,
            "seconds": summary.seconds,
            "supervised_tokens": summary.supervised_tokens,
            "total_tokens": summary.total_tokens,
        }
    write_json(output_dir / RUN_NAME, record)
