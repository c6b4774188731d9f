"""`train(config)`: from a config to a trained model and its report."""

from __future__ import annotations

import gc
import logging
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

from datasets import Dataset
from rich.console import Console
from transformers import PrinterCallback, ProgressCallback, TrainingArguments, set_seed

from pyralis.data.left_out import LEFT_OUT_NAME
from pyralis.data.preview import shown_rows
from pyralis.data.progress import tokenising
from pyralis.data.template import install_template
from pyralis.errors import ConfigError, NotFiniteError
from pyralis.train.answers import answer_questions, answers_table
from pyralis.train.checkpoints.checkpoint import (
    CONFIG_NAME,
    RUN_NAME,
    StartPoint,
    check_same_data,
    find_start_point,
    prepare_output_dir,
    run_record,
    write_json,
)
from pyralis.train.checkpoints.lock import only_run_in
from pyralis.train.config.check_files import check_files
from pyralis.train.config.libraries import check_libraries
from pyralis.train.config.refusals import refusals_named
from pyralis.train.config.train_config import LoadedConfig, TrainConfig, config_from_dict, load_config
from pyralis.train.data_stats import data_stats
from pyralis.train.deterministic import deterministic
from pyralis.train.early_stopping import EarlyStop
from pyralis.train.eval_samples import EvalSamples, sample_answers
from pyralis.train.interrupt import GracefulStop, StopCallback
from pyralis.train.make_trainer import make_trainer
from pyralis.train.memory_account import MemoryCount
from pyralis.train.predicted_memory import plan_of, predict_memory
from pyralis.train.preference.dpo_run import PreferenceTrainer
from pyralis.train.prepared_data import check_rows
from pyralis.train.report.live import LiveLine
from pyralis.train.report.memory_table import memory_table
from pyralis.train.report.metric_rows import METRICS_NAME
from pyralis.train.report.metrics import MetricsCallback, MetricsWriter
from pyralis.train.report.mfu import mfu_of
from pyralis.train.report.model_card import model_card
from pyralis.train.report.outcome import (
    OutcomeFiles,
    describe_start,
    final_info,
    result_notes,
    run_facts,
    summary_facts,
    write_outcome,
)
from pyralis.train.report.panel import final_panel, startup_panel
from pyralis.train.report.run_report import SampleAnswer
from pyralis.train.report.summary import RunSummary, summarise
from pyralis.train.save_result import save_result
from pyralis.train.setup import PreparedData, PreparedModel, prepare_data, prepare_model, training_arguments
from pyralis.train.trainer import restore_counts

logger = logging.getLogger(__name__)

EXAMPLES = 2  # rows of the data that a report shows


def is_main_process() -> bool:
    """Whether this is the process that writes and prints, by the RANK that launchers set."""
    return int(os.environ.get("RANK", "0")) == 0


@dataclass(frozen=True, slots=True)
class TrainResult:
    """What a run came to and where it lies."""

    status: Literal["finished", "interrupted"]
    signal: str | None  # what interrupted it: SIGINT or SIGTERM
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
        NotFiniteError: a loss or gradient is NaN or infinite, and `on_nan` is stop.
        PyralisError: anything else that the user can mend.
    """
    loaded = _checked(config, overrides)
    with deterministic(loaded.config.deterministic):
        return _train(loaded, console, next_commands)


def _train(
    loaded: LoadedConfig, console: Console | None, next_commands: Sequence[tuple[str, str]] | None
) -> TrainResult:
    config = loaded.config
    check_files(config)
    check_libraries(config)
    main = is_main_process()
    console = (console or Console(highlight=False)) if main else Console(quiet=True)
    output_dir = Path(config.output_dir)
    effective = config.effective()
    find = partial(
        find_start_point,
        output_dir,
        effective,
        resume=config.resume_from_checkpoint,
        overwrite=config.overwrite_output_dir,
    )
    start = find()
    set_seed(config.seed)
    arguments, argument_notes = training_arguments(config)
    with tokenising(console) as progress:
        prepared = prepare_data(config, progress)
    check_rows(prepared.data, arguments)
    check_same_data(start, prepared.data.digest)
    with console.status(f"loading {config.model_name_or_path}"):
        model = prepare_model(config, prepared)

    run = partial(_run, config, [*loaded.notes, *argument_notes], arguments, prepared, model, start, console)
    if not main:
        return run(next_commands)
    with only_run_in(output_dir):
        if find() != start:
            raise ConfigError(f"output_dir {output_dir}: another run wrote into it meanwhile. Start again.")
        prepare_output_dir(output_dir, start)
        if prepared.data.left_out is not None:
            shutil.copyfile(prepared.data.left_out, output_dir / LEFT_OUT_NAME)
        write_json(output_dir / CONFIG_NAME, effective)
        write_json(output_dir / RUN_NAME, run_facts("running", config, prepared, model))
        return run(next_commands)


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
    notes: Sequence[str],
    arguments: TrainingArguments,
    prepared: PreparedData,
    model: PreparedModel,
    start: StartPoint,
    console: Console,
    next_commands: Sequence[tuple[str, str]] | None,
) -> TrainResult:
    output_dir = Path(config.output_dir)
    with refusals_named():
        trainer = make_trainer(config, arguments, prepared, model)
    if start.checkpoint is not None:
        restore_counts(trainer, start.checkpoint)
    if prepared.template is not None:
        install_template(prepared.template, prepared.tokenizer)

    if isinstance(trainer, PreferenceTrainer):
        with console.status("computing the reference") as shown:
            trainer.prepare_reference(lambda done: shown.update(f"computing the reference: {done:,} pairs"))
        notes = [*notes, *trainer.notes]

    questions = list(config.sample_prompts or ()) if prepared.template is not None else []
    before = _answers(config, prepared, model, questions, console, "before")

    main = trainer.is_world_process_zero()
    writer = MetricsWriter(output_dir / METRICS_NAME, resume_step=start.step) if main else None
    counts = trainer.token_counts
    preferences = config.task_type == "dpo"  # the reference's forward pass comes on top of what MFU counts
    mfu = None if preferences else mfu_of(
        model.model, model.loaded.device, model.loaded.dtype, arguments.world_size
    )  # fmt: skip
    parts = trainer.time_parts()
    metrics = MetricsCallback(writer, lambda: (counts.supervised, counts.total), mfu, parts.seconds)
    with trainer.compute_loss_context_manager():
        predicted = predict_memory(config, model.model, prepared.data.train)
    info = describe_start(config, prepared, model, trainer, start, notes, predicted)
    memory = MemoryCount(arguments.device, in_parts=bool(config.deepspeed or config.fsdp))
    trainer.add_callback(memory)
    rows = prepared.data.train if isinstance(prepared.data.train, Dataset) else ()
    write = partial(
        write_outcome, output_dir, info, effective=config.effective(), data=prepared.data.report,
        examples=list(shown_rows(rows, prepared.tokenizer, EXAMPLES)),
    )  # fmt: skip
    trainer.remove_callback(ProgressCallback)
    trainer.remove_callback(PrinterCallback)
    trainer.add_callback(metrics)
    trainer.watch_steps(config.on_nan, metrics.record_at)
    live = LiveLine(metrics, console)
    if main:
        trainer.add_callback(live)
        console.print(startup_panel(info))

    if config.early_stopping_patience is not None:
        trainer.add_callback(EarlyStop(config.early_stopping_patience, config.early_stopping_threshold, metrics))
    if questions and config.sample_at_eval and prepared.template is not None:
        answer = partial(
            answer_questions, model.model, prepared.tokenizer, prepared.template, questions,
            max_new_tokens=config.sample_max_new_tokens,
        )  # fmt: skip
        trainer.add_callback(EvalSamples(questions, answer, metrics))

    with GracefulStop() as stop:
        trainer.add_callback(StopCallback(stop))
        # What lives for the whole run need not be looked through again and again: with a model of 32 layers Python's
        # collector adds 20 ms to a call.
        gc.collect()
        gc.freeze()
        try:
            trainer.train(resume_from_checkpoint=str(start.checkpoint) if start.checkpoint else None)
        except NotFiniteError:
            if main:  # what led there can be looked at
                write(metrics.history, batches=None, samples=())
                write_json(output_dir / RUN_NAME, run_record(output_dir) | {"status": "stopped"})
            raise
        finally:
            gc.unfreeze()
            live.close()  # after an error the Trainer calls no callback any more
    interrupted = stop.requested is not None and trainer.state.global_step < trainer.state.max_steps
    status: Literal["finished", "interrupted"] = "interrupted" if interrupted else "finished"
    if interrupted:
        metrics.record_event("interrupted", f"{stop.requested}: a checkpoint was saved")

    after = [] if interrupted else _answers(config, prepared, model, questions, console, "after")
    samples = sample_answers(questions, before, after, metrics.history)
    summary = summarise(metrics.history)
    if main and not interrupted:
        save_result(trainer, output_dir, model_card(info, summary))
    files = OutcomeFiles(metrics=output_dir / METRICS_NAME)
    if main:
        result = [] if interrupted else result_notes(trainer.best_loaded, metrics.history)
        result += [trainer.step_graphs_summary] if trainer.step_graphs_summary else []
        batches = data_stats(prepared.data.train, config)
        table = memory_table(plan_of(model.model, predicted), memory.found, summary)
        files = write(metrics.history, batches=batches, samples=samples, notes=result, memory=table)
        outcome = {"step": trainer.state.global_step, **summary_facts(summary)}
        write_json(output_dir / RUN_NAME, run_record(output_dir) | {"status": status, **outcome})
        if samples:
            console.print(answers_table(samples))
        console.print(final_panel(final_info(config, summary, files, interrupted, samples, next_commands, result)))
    trainer.accelerator.wait_for_everyone()
    return TrainResult(status, stop.requested if interrupted else None, output_dir, summary, files, samples)


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
