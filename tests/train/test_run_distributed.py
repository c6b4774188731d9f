"""Two processes on the CPU: only the first writes and prints, and together they take the step that one would take."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
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
    done = pyralis("train", str(file), "--gpus", "2")
    said = done.communicate(timeout=120)[0]
    assert done.returncode == 0, said
    assert said.count("Pyralis · done") == 1
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert {"adapter_model.safetensors", "checkpoint-2", "pyralis_template.json", "report.html"} <= names
    assert not [name for name in names if name.startswith(".")]

    run(tiny_llama, chats, tmp_path / "one", per_device_train_batch_size=12, max_steps=2, logging_steps=1)
    two, one = (
        [m.loss for m in read_metrics(tmp_path / name / "metrics.jsonl") if isinstance(m, StepMetrics)]
        for name in ("out", "one")
    )
    assert two == pytest.approx(one, rel=1e-5)


@pytest.mark.full
def test_a_stopped_run_goes_on(tiny_llama: Path, chats: Path, tmp_path: Path) -> None:
    """SIGTERM, seen by each process in a step of its own, ends both in one; resumed it is the run left alone."""

    def config(name: str) -> str:
        values = {
            "model_name_or_path": str(tiny_llama), "train_file": str(chats), "max_seq_length": 96, "train_mode": "lora",
            "lora_rank": 4, "lora_dropout": 0.1, "dtype": "float32", "max_steps": 60, "logging_steps": 1,
            "per_device_train_batch_size": 2, "learning_rate": 1e-2, "cache_dir": str(tmp_path / "cache"),
            "output_dir": str(tmp_path / name), "save_steps": 1000,
        }  # fmt: skip
        file = tmp_path / f"{name}.json"
        file.write_text(json.dumps(values))
        return str(file)

    def losses(name: str) -> list[float]:
        rows = read_metrics(tmp_path / name / "metrics.jsonl")
        return [row.loss for row in rows if isinstance(row, StepMetrics)]

    whole = pyralis("train", config("whole"), "--gpus", "2")
    assert whole.wait(240) == 0

    stopped = pyralis("train", config("stopped"), "--gpus", "2")
    written = tmp_path / "stopped" / "metrics.jsonl"
    while not (written.exists() and written.stat().st_size):
        assert stopped.poll() is None
        time.sleep(0.02)
    stopped.send_signal(signal.SIGTERM)
    assert stopped.wait(120) == 75
    assert 0 < len(losses("stopped")) < 60
    again = pyralis("train", config("stopped"), "--gpus", "2")
    assert again.wait(240) == 0
    assert losses("stopped") == losses("whole")


def pyralis(*arguments: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "pyralis", *arguments], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip
