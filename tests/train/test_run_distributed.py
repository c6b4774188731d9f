"""Two processes on the CPU: only the first writes and prints, and together they take the step that one would take."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from pyralis.train.report.metrics import StepMetrics, read_metrics
from tests.train.runs import run


def test_two_processes_take_the_step_of_one(tiny_llama: Path, chats: Path, tmp_path: Path) -> None:
    config = {
        "model_name_or_path": str(tiny_llama), "train_file": str(chats), "max_seq_length": 96, "train_mode": "lora",
        "lora_rank": 4, "lora_dropout": 0.0, "dtype": "float32", "max_steps": 2, "logging_steps": 1, "save_steps": 1,
        "per_device_train_batch_size": 6, "learning_rate": 1e-2, "eval_file": str(chats), "eval_strategy": "epoch",
        "cache_dir": str(tmp_path / "cache"), "output_dir": str(tmp_path / "out"),
    }  # fmt: skip
    file = tmp_path / "config.json"
    file.write_text(json.dumps(config))
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    done = subprocess.run(
        [*launch, "-m", "pyralis", "train", str(file)], capture_output=True, text=True, check=False, timeout=120
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("Pyralis · done") == 1
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert {"adapter_model.safetensors", "checkpoint-2", "pyralis_template.json", "report.html"} <= names
    assert not [name for name in names if name.startswith(".")]

    run(tiny_llama, chats, tmp_path / "one", per_device_train_batch_size=12, max_steps=2, logging_steps=1)
    two, one = (
        [m.loss for m in read_metrics(tmp_path / name / "metrics.jsonl") if isinstance(m, StepMetrics)]
        for name in ("out", "one")
    )
    assert two == pytest.approx(one, rel=1e-5)
