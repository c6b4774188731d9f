"""Sensible values for a task, a mode and a model size. Presets and `pyralis init` are made from these."""

from __future__ import annotations

import re
from typing import Any

from pyralis.train.config.fields import learning_rate

SAMPLE_DATA = {"sft": "data/sample_sft.jsonl", "pretrain": "data/pretrain", "dpo": "data/sample_dpo.jsonl"}
ZERO3 = "train_args/ds_z3_config.json"

_SEQUENCE = {"sft": 1024, "pretrain": 2048, "dpo": 1024}
_EXAMPLES_PER_STEP = 16


def recipe(model: str, task: str, mode: str, *, billions: float, template: str = "", name: str = "") -> dict[str, Any]:
    """A whole config, in the order it is best read.

    `billions` of parameters decide on the batch, and on DeepSpeed ZeRO-3 for full training from 6 up: weights,
    gradients and Adam's states take 16 bytes a parameter, more than one 80 GB GPU holds.
    """
    sharded = mode == "full" and billions >= 6
    batch = 1 if billions >= 6 else 2 if billions > 2 else 4 if billions > 0.5 else 8
    values: dict[str, Any] = {
        "output_dir": f"output/{name or model.rstrip('/').rpartition('/')[2].lower()}-{task}-{mode}",
        "model_name_or_path": model,
    }
    if sharded:
        values["deepspeed"] = ZERO3
    values |= {"train_file": SAMPLE_DATA[task], "task_type": task, "train_mode": mode}
    if task != "pretrain":
        values["template_name"] = template
    values["max_seq_length"] = _SEQUENCE[task]
    if task == "dpo":
        values |= {"max_prompt_length": 512, "beta": 0.1}
    values |= {
        "num_train_epochs": 1,
        "per_device_train_batch_size": batch,
        "gradient_accumulation_steps": _EXAMPLES_PER_STEP // batch,
        "learning_rate": 2e-5 if (task, mode) == ("pretrain", "full") else learning_rate(task, mode),
        "lr_scheduler_type": "cosine",
        "warmup_steps": 0.03,
        "weight_decay": 0.1 if task == "pretrain" and mode == "full" else 0,
        "max_grad_norm": 1.0,
        "optim": {"qlora": "paged_adamw_32bit"}.get(mode, "adamw_torch" if sharded else "adamw_torch_fused"),
    }
    if mode != "full":
        values |= {"lora_rank": 64, "lora_alpha": 16, "lora_dropout": 0.05}
    return values | {
        "gradient_checkpointing": True,
        "logging_steps": 10,
        "save_strategy": "steps",
        "save_steps": 100,
        "save_total_limit": 2,
        "report_to": "tensorboard",
        "seed": 42,
    }


def billions_of(model: str, default: float = 7.0) -> float:
    """Billions of parameters as the name says them: 135M -> 0.135, 8x7B -> 56, 3.8b -> 3.8."""
    match = re.search(r"(?<![a-z0-9.])(?:(\d+)x)?(\d+(?:\.\d+)?)([mb])(?![a-z])", model.lower())
    if match is None:
        return default
    experts, number, unit = match.groups()
    return float(number) * int(experts or 1) / (1000 if unit == "m" else 1)
