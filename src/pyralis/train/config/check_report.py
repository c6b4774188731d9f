"""The checked config as people and programs read it."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

from rich.console import Group, RenderableType
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from pyralis.train.config.check_dpo import DPO_FIELDS
from pyralis.train.config.train_config import LoadedConfig, TrainConfig

_GROUPS: dict[str, tuple[str, ...]] = {
    "Model": (
        "model_name_or_path",
        "model_revision",
        "architecture",
        "acceleration",
        "attn_implementation",
        "precision",
    ),
    "Data": (
        *("train_file", "template_name", "system", "data_format", "dataset_split", "max_samples", "max_seq_length"),
        *("packing", "loss_on", "on_bad_row", "on_overlong", "max_data_lost", "eval_file", "eval_split"),
    ),
    "Method": (
        *(
            "task_type",
            "train_mode",
            "beta",
            "loss_type",
            "max_prompt_length",
            "lora_rank",
            "lora_alpha",
            "lora_dropout",
        ),
        *("lora_target_modules", "quant_type", "double_quant", "load_adapter"),
    ),
    "Optimisation": (
        *("learning_rate", "lr_scheduler_type", "warmup_steps", "optim", "weight_decay", "max_grad_norm", "epochs"),
        *("per_device_train_batch_size", "gradient_accumulation_steps", "gradient_checkpointing", "deepspeed", "seed"),
    ),
    "Output": (
        *("output_dir", "overwrite_output_dir", "resume_from_checkpoint", "logging_steps", "save_strategy"),
        *("save_steps", "save_total_limit", "eval_strategy", "eval_steps", "report_to"),
    ),
}
_DERIVED = {"architecture", "precision", "epochs"}
_SHOWN = {name for names in _GROUPS.values() for name in names} | {
    *("fp16", "bf16", "dtype", "use_unsloth", "num_train_epochs", "max_steps", "disable_tqdm", "remove_unused_columns"),
    *("logging_nan_inf_filter",),
}


def format_check(loaded: LoadedConfig) -> RenderableType:
    """A table of the values that shape the run, grouped; then other values that were changed; then the notes."""
    config = loaded.config
    table = Table(box=None, show_header=False, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column(style="bold", no_wrap=True)
    table.add_column(style="dim", no_wrap=True)
    table.add_column(overflow="fold")
    groups = {title: _rows(config, names) for title, names in _GROUPS.items()}
    others = [(name, _text(value)) for name, value in _other_values(config).items()]
    for title, rows in {**groups, "Also set": others}.items():
        for index, (name, value) in enumerate(rows):
            table.add_row("" if index else title, name, Text(value))
    title = f"valid · {loaded.path or 'config'}"  # in this order: a long path is cut at its end
    parts: list[RenderableType] = [Panel(table, title=Text(title), title_align="left", border_style="green")]
    parts += [Text.assemble(("note  ", "yellow"), note) for note in loaded.notes]
    return Group(*parts)


def json_check(loaded: LoadedConfig) -> str:
    """The same for programs: `{"config": ..., "architecture": ..., "notes": [...]}`."""
    architecture = dataclasses.asdict(loaded.config.architecture)
    report = {"config": loaded.config.effective(), "architecture": architecture, "notes": list(loaded.notes)}
    return json.dumps(report, indent=2, ensure_ascii=False)


def _rows(config: TrainConfig, names: tuple[str, ...]) -> list[tuple[str, str]]:
    rows = []
    for name in names:
        value = _derived(config, name) if name in _DERIVED else getattr(config, name)
        if value not in (None, "", False, 0) and _applies(config, name):
            rows.append((name, _text(value)))
        elif name == "template_name" and config.task_type != "pretrain":
            rows.append((name, "the tokenizer's own"))
    return rows


def _applies(config: TrainConfig, name: str) -> bool:
    if name in DPO_FIELDS:
        return config.task_type == "dpo"
    if name in ("template_name", "system", "loss_on"):
        return config.task_type == "sft" or (name != "loss_on" and config.task_type == "dpo")
    if name.startswith("lora_") or name == "load_adapter":
        return config.train_mode != "full"
    if name in ("quant_type", "double_quant"):
        return config.train_mode == "qlora"
    if name in ("save_steps", "eval_steps"):
        return bool(getattr(config, name.replace("steps", "strategy")) == "steps")
    return True


def _derived(config: TrainConfig, name: str) -> str:
    if name == "architecture":
        found = config.architecture
        return f"{found.name}, {found.reason}" if found.source != "unknown" else found.reason
    if name == "epochs":
        return f"{config.max_steps} steps" if config.max_steps > 0 else f"{config.num_train_epochs:g}"
    return {
        "auto": "what the machine does best",
        "bfloat16": "bfloat16 (float32 on a CPU that is not fast in it)",
        "float16": "float16 (float32 where there is no GPU)",
        "float32": "float32",
    }[config.requested_dtype]


def _other_values(config: TrainConfig) -> dict[str, Any]:
    """Values that differ from their default and stand in no group."""
    fields = TrainConfig.model_fields
    return {
        name: value
        for name, value in config.effective().items()
        if name not in _SHOWN and (fields[name].default_factory or value != fields[name].default)
    }


def _text(value: Any) -> str:
    if isinstance(value, bool) or value is None:
        return str(value).lower().replace("none", "null")
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
