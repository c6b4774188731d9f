"""Whole runs on a tiny model, in a second each."""

from __future__ import annotations

from io import StringIO
from pathlib import Path
from typing import Any

from rich.console import Console

from pyralis.train.run import TrainResult, train

WORDS = ("red", "blue", "green", "gold", "grey", "pink", "teal", "navy", "plum", "rust", "sand", "wine")


def run(model: Path, data: Path, output: Path, **values: Any) -> TrainResult:
    config: dict[str, Any] = {
        "model_name_or_path": str(model), "train_file": str(data), "output_dir": str(output), "max_seq_length": 96,
        "train_mode": "lora", "lora_rank": 4, "lora_dropout": 0.0, "dtype": "float32", "max_steps": 4,
        "per_device_train_batch_size": 2, "learning_rate": 1e-2, "lr_scheduler_type": "constant",
        "cache_dir": str(output.parent / "cache"),
    }  # fmt: skip
    return train(config | values, console=quiet())


def quiet() -> Console:
    return Console(file=StringIO(), width=100)
