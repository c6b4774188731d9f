"""Runs of TRL's SFTTrainer and ours on a tiny model, and what makes two of them alike."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import trl
from datasets import Dataset
from peft import LoraConfig

from pyralis.train.sft_trainer import SFTConfig, SFTTrainer
from tests.tiny import build_tiny_model, make_tiny_tokenizer

LORA = LoraConfig(r=4, target_modules=["q_proj", "up_proj", "down_proj"])
CHATS = [
    {"messages": [{"role": "user", "content": f"q{i}" * 5}, {"role": "assistant", "content": f"a{i}" * (3 + i)}]}
    for i in range(8)
]
COMPLETIONS = [{"prompt": f"question {i} " * (1 + i % 3), "completion": f"answer {i}" * (1 + i % 2)} for i in range(8)]
TEXTS = [{"text": f"a text of some length, number {i}. " * (1 + i % 3)} for i in range(8)]
GENERATION_JINJA = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}{% if message['role'] == 'assistant' %}"
    "{% generation %}{{ message['content'] + '<|im_end|>' }}{% endgeneration %}{% else %}"
    "{{ message['content'] + '<|im_end|>' }}{% endif %}{{ '\n' }}{% endfor %}"
)
DEFAULTS: dict[str, Any] = {
    "max_steps": 3, "per_device_train_batch_size": 2, "report_to": "none", "use_cpu": True, "bf16": False,
    "logging_steps": 1, "max_length": 64, "learning_rate": 1e-2, "save_strategy": "no", "disable_tqdm": True,
}  # fmt: skip


def build(cls: Any, folder: Path, rows: Any = CHATS, *, config: Any = None, model: Any = None, **given: Any) -> Any:
    """A trainer of either class; `given`: fields of the config by `settings`, else arguments of the trainer."""
    config = config or (SFTConfig if issubclass(cls, SFTTrainer) else trl.SFTConfig)
    settings = given.pop("settings", {})
    arguments = {"processing_class": make_tiny_tokenizer(), "peft_config": copy.deepcopy(LORA), **given}
    return cls(
        model=build_tiny_model() if model is None else model,
        args=config(output_dir=str(folder), **DEFAULTS | settings),
        train_dataset=Dataset.from_list(rows),
        **arguments,
    )


def losses(trainer: Any, name: str = "loss") -> list[float]:
    return [entry[name] for entry in trainer.state.log_history if name in entry]


def trained(cls: Any, folder: Path, *args: Any, **given: Any) -> Any:
    trainer = build(cls, folder, *args, **given)
    trainer.train()
    return trainer


def assert_alike(ours: Any, theirs: Any, name: str = "loss") -> None:
    assert losses(ours, name) == pytest.approx(losses(theirs, name), rel=1e-6)
    assert len(set(losses(theirs, name))) > 1
    norms = losses(theirs, "grad_norm")
    assert losses(ours, "grad_norm") == pytest.approx(norms, rel=1e-5)
    assert losses(ours, "num_tokens") == losses(theirs, "num_tokens")
