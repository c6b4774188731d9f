"""How fields must fit together, and what their writer should know. One small rule for each concern."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK

from pyralis.train.config.check_dpo import DPO_FIELDS, dpo_rule
from pyralis.train.config.check_evaluation import evaluation_rule
from pyralis.train.config.check_files import files_rule, model_rule
from pyralis.train.config.check_sources import sources_rule
from pyralis.train.config.findings import Finding, note, unused
from pyralis.train.config.suggest import did_you_mean
from pyralis.train.full_weights import full_rule

if TYPE_CHECKING:
    from pyralis.train.config.train_config import TrainConfig

Rule: TypeAlias = Callable[["TrainConfig"], Iterator[Finding]]


def check(config: TrainConfig) -> list[Finding]:
    """Everything that is wrong or worth knowing about the config as a whole."""
    return [finding for rule in RULES for finding in rule(config)]


def _precision(config: TrainConfig) -> Iterator[Finding]:
    for bf16, fp16 in (("bf16", "fp16"), ("bf16_full_eval", "fp16_full_eval")):
        if getattr(config, bf16) and getattr(config, fp16):
            yield Finding((bf16, fp16), f"{bf16} and {fp16} are both true; at most one may be.")
    flag = "fp16" if config.fp16 else "bf16" if config.bf16 else None
    if flag and config.dtype not in ("auto", config.requested_dtype):
        yield note(flag, "dtype", message=f"{flag}: true counts before dtype: {config.dtype}.")
    if flag and config.use_cpu:
        yield note(flag, "use_cpu", message=f"{flag}: on a CPU training computes in float32.")


def _task(config: TrainConfig) -> Iterator[Finding]:
    yield from sources_rule(config)
    task = config.task_type
    if task == "dpo":
        if config.packing:
            yield Finding(
                ("packing", "task_type"), "packing: true does not go with task_type: dpo; pairs are not packed."
            )
        yield from dpo_rule(config)
        if config.max_prompt_length >= config.max_seq_length:
            yield Finding(
                ("max_prompt_length", "max_seq_length"),
                f"max_prompt_length: {config.max_prompt_length} leaves no room for answers in max_seq_length: "
                f"{config.max_seq_length}; it must be smaller.",
            )
    else:
        yield from unused(config, DPO_FIELDS, f"only dpo uses it, and this is {task}")
    allowed = {"dpo": ("auto", "preference"), "pretrain": ("auto", "text")}
    if config.data_format not in allowed.get(task, (config.data_format,)):
        yield Finding(
            ("data_format", "task_type"),
            f"data_format: {config.data_format} does not go with task_type: {task}; expected "
            f"{' or '.join(allowed[task])}.",
        )
    if task == "sft" and config.data_format == "preference":
        yield Finding(("data_format", "task_type"), "data_format: preference goes with task_type: dpo only.")
    if task == "pretrain":
        yield from unused(config, ("template_name", "system", "loss_on"), "pretraining learns all text as it is")
        if config.packing:
            yield from unused(config, ("on_overlong",), "packed documents are never too long")
    if task == "dpo":
        yield from unused(config, ("loss_on",), "dpo compares whole answers")


def _mode(config: TrainConfig) -> Iterator[Finding]:
    yield from full_rule(config)
    lora = tuple(name for name in type(config).model_fields if name.startswith(("lora_", "use_rslora", "use_dora")))
    quantisation = ("quant_type", "double_quant")
    if config.train_mode == "full":
        yield from unused(config, (*lora, "modules_to_save", "init_lora_weights", *quantisation), "train_mode is full")
        if config.load_adapter:
            yield Finding(
                ("load_adapter", "train_mode"),
                "load_adapter: an adapter cannot go on in train_mode: full; merge it first (`pyralis export merge`), "
                "or use lora or qlora.",
            )
    elif config.load_adapter:
        own = (*lora, "modules_to_save", "init_lora_weights")
        yield from unused(config, own, "the adapter of load_adapter brings its own")
    if config.embedding_learning_rate is not None and not _may_train_embeddings(config):
        yield note(
            "embedding_learning_rate",
            message="embedding_learning_rate: has no effect: embeddings and head are not trained; modules_to_save: "
            "[embed_tokens, lm_head] would.",
        )
    if config.train_mode == "lora":
        yield from unused(config, quantisation, "train_mode is lora")
    if config.train_mode == "qlora" and config.init_lora_weights == "orthogonal":
        yield Finding(
            ("init_lora_weights", "train_mode"),
            "init_lora_weights: orthogonal cannot start from 4-bit weights; use true or gaussian, or train_mode: lora.",
        )


def _may_train_embeddings(config: TrainConfig) -> bool:
    named = config.modules_to_save or config.load_adapter or config.lora_target_modules != "all-linear"
    return config.train_mode == "full" or bool(named)


def _places(config: TrainConfig) -> Iterator[Finding]:
    try:
        output = Path(config.output_dir).resolve()
        there = output.exists()
    except (OSError, ValueError) as error:  # too long, or with a zero byte
        yield Finding(("output_dir",), f"output_dir: {config.output_dir[:80]!r} is no name for a folder: {error}.")
        return
    if there and not output.is_dir():
        yield Finding(("output_dir",), f"output_dir: {config.output_dir} is a file; expected a folder, or a new name.")
    for name in ("model_name_or_path", "load_adapter"):
        value = getattr(config, name)
        folder = os.path.expanduser(value or "")
        if os.path.isdir(folder) and Path(folder).resolve() == output:
            yield Finding(
                ("output_dir", name),
                f"output_dir: {config.output_dir} is the {name} itself, which the result would overwrite. Choose "
                "another output_dir.",
            )


def _steps(config: TrainConfig) -> Iterator[Finding]:
    for what in ("logging", "eval", "save"):
        steps = getattr(config, f"{what}_steps")
        if getattr(config, f"{what}_strategy") == "steps" and steps and steps > 1 and steps != int(steps):
            yield Finding((f"{what}_steps",), f"{what}_steps: {steps} is not allowed; from 1 on it must be whole.")
    if config.warmup_steps > 1 and config.warmup_steps != int(config.warmup_steps):
        yield Finding(
            ("warmup_steps",), f"warmup_steps: {config.warmup_steps} is not allowed; from 1 on it must be whole."
        )
    if config.max_steps == 0:
        yield Finding(
            ("max_steps",), "max_steps: 0 trains nothing; expected at least 1, or -1 to go by num_train_epochs."
        )
    if config.max_steps > 0 and "num_train_epochs" in config.model_fields_set:
        yield note("max_steps", message=f"num_train_epochs: has no effect: max_steps is {config.max_steps}.")
    if config.overwrite_output_dir and config.resume_from_checkpoint not in ("auto", False):
        yield Finding(
            ("overwrite_output_dir", "resume_from_checkpoint"),
            "overwrite_output_dir: true starts anew and resume_from_checkpoint goes on; keep one of them.",
        )


def _loader(config: TrainConfig) -> Iterator[Finding]:
    if config.dataloader_num_workers == 0:
        for name in ("dataloader_prefetch_factor", "dataloader_persistent_workers"):
            if getattr(config, name):
                yield Finding((name, "dataloader_num_workers"), f"{name} needs dataloader_num_workers of at least 1.")


def _speed(config: TrainConfig) -> Iterator[Finding]:
    meant = config.acceleration if config.use_unsloth is None else "on" if config.use_unsloth else "off"
    if config.acceleration != meant:
        yield Finding(
            ("use_unsloth", "acceleration"),
            f"use_unsloth: {str(config.use_unsloth).lower()} means acceleration: {meant}, but acceleration is "
            f"{config.acceleration}. Keep one of them.",
        )
    elif config.use_unsloth:
        yield note("use_unsloth", message="use_unsloth: true: Pyralis's own accelerated path (acceleration: on).")
    if config.acceleration == "on" and config.use_liger_kernel:
        yield Finding(
            ("acceleration", "use_liger_kernel"),
            "use_liger_kernel and acceleration: on replace the same layers; keep one of them.",
        )


def _distributed(config: TrainConfig) -> Iterator[Finding]:
    if config.deepspeed and config.fsdp:
        yield Finding(("deepspeed", "fsdp"), "deepspeed and fsdp are both given; keep one.")


def _reporting(config: TrainConfig) -> Iterator[Finding]:
    named = [config.report_to] if isinstance(config.report_to, str) else config.report_to
    for name in named:
        if name not in {"all", "none", *INTEGRATION_TO_CALLBACK}:
            yield Finding(
                ("report_to",),
                f"report_to: {name!r} is not allowed; expected none, all, or some of "
                f"{', '.join(sorted(INTEGRATION_TO_CALLBACK))}.{did_you_mean(name, INTEGRATION_TO_CALLBACK)}",
            )


RULES: tuple[Rule, ...] = (
    *(model_rule, _precision, _task, _mode, _places, evaluation_rule, _steps, _loader, _speed, _distributed),
    _reporting,
    files_rule,
)
