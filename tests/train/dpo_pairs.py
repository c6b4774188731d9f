"""TRL's DPO and ours, on equal models and the same data."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
import trl
from datasets import Dataset
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn

from pyralis.train.preference.dpo_trainer import DPOTrainer
from tests.tiny import build_tiny_model, make_tiny_tokenizer

LORA = LoraConfig(r=4, lora_dropout=0.1, target_modules=["q_proj", "v_proj", "up_proj", "down_proj"])
PREFERENCES = [
    {"prompt": f"hello {i}" * (1 + i % 3), "chosen": " good" * (1 + i % 3), "rejected": " bad" * (1 + i % 4)}
    for i in range(8)
]


def config(folder: Path, **settings: Any) -> trl.DPOConfig:
    fields: dict[str, Any] = {
        "max_steps": 3, "per_device_train_batch_size": 2, "report_to": "none", "use_cpu": True, "bf16": False,
        "logging_steps": 1, "max_length": 64, "learning_rate": 1e-2, "save_strategy": "no", "disable_tqdm": True,
        "gradient_checkpointing": False,
    }  # fmt: skip
    return trl.DPOConfig(output_dir=str(folder), **fields | settings)


def trainer(
    ours: bool, folder: Path, model: nn.Module | None = None, *, rows: Any = PREFERENCES, extra: Any = None,
    given: Any = None, **settings: Any,
) -> Any:  # fmt: skip
    """given: of both trainers; extra: of ours alone."""
    model = build_tiny_model() if model is None else model
    cls = DPOTrainer if ours else trl.DPOTrainer
    arguments = {"train_dataset": Dataset.from_list(rows), "processing_class": make_tiny_tokenizer()} | (given or {})
    return cls(model, args=config(folder, **settings), **arguments, **(extra or {}) if ours else {})


def lora(seed: int = 3, **settings: Any) -> PeftModel:
    """A tiny model with an adapter that does something: B is not zero."""
    model = get_peft_model(build_tiny_model(), copy.deepcopy(LORA))
    settle_adapter(model, seed)
    return model


def settle_adapter(model: nn.Module, seed: int = 3, adapter: str = "default") -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in sorted(model.named_parameters()):
            if f".{adapter}." in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)


def step(trained: Any) -> tuple[torch.Tensor, dict[str, torch.Tensor], dict[str, float]]:
    """(loss, every gradient, what would be logged) of the first batch."""
    batch = next(iter(trained.get_train_dataloader()))
    trained.model.train()
    trained.model.zero_grad()
    loss = trained.compute_loss(trained.model, trained._prepare_inputs(batch))
    loss.backward()
    logs: dict[str, float] = {}
    trained.log(logs)
    grads = {name: p.grad.clone() for name, p in trained.model.named_parameters() if p.grad is not None}
    return loss.detach(), grads, logs


def off_by(mine: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> float:
    """The largest relative error of a gradient."""
    assert mine.keys() == theirs.keys()
    largest = max(float(g.norm()) for g in theirs.values())
    return max(float((mine[n] - g).norm()) / max(float(g.norm()), 1e-4 * largest) for n, g in theirs.items())
