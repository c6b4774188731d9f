"""Two processes on the CPU train all weights in bfloat16, over a stream that the first one reads, and resume in it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from pyralis.train.checkpoints.checkpoint import RUN_NAME, write_json
from pyralis.train.report.metrics import StepMetrics, read_metrics
from tests.train.runs import run

CONFIG: dict[str, Any] = {
    "task_type": "pretrain", "streaming": True, "stream_buffer_size": 4, "train_mode": "full", "dtype": "bfloat16",
    "max_steps": 4, "logging_steps": 1, "save_steps": 2, "learning_rate": 1e-3, "max_seq_length": 48,
}  # fmt: skip


def in_two_processes(config: dict[str, Any], file: Path) -> None:
    file.write_text(json.dumps(config))
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    done = subprocess.run(
        [*launch, "-m", "pyralis", "train", str(file)], capture_output=True, text=True, check=False, timeout=180
    )
    assert done.returncode == 0, done.stdout + done.stderr


def losses(folder: Path) -> list[float | None]:
    return [m.loss for m in read_metrics(folder / "metrics.jsonl") if isinstance(m, StepMetrics)]


@pytest.mark.full
def test_two_processes_read_one_stream(tiny_llama: Path, documents: Path, tmp_path: Path) -> None:
    run(tiny_llama, documents, tmp_path / "one", **CONFIG, per_device_train_batch_size=4)
    output = tmp_path / "two"
    config = CONFIG | {
        "model_name_or_path": str(tiny_llama), "train_file": str(documents), "output_dir": str(output),
        "per_device_train_batch_size": 2, "lr_scheduler_type": "constant", "cache_dir": str(tmp_path / "cache"),
    }  # fmt: skip
    in_two_processes(config, tmp_path / "config.json")
    whole = losses(output)
    assert whole == pytest.approx(losses(tmp_path / "one"), rel=2e-3)  # gradients are added up in bfloat16

    record = json.loads((output / RUN_NAME).read_text())
    write_json(output / RUN_NAME, record | {"status": "interrupted"})
    (output / "checkpoint-4").rename(output / "gone")
    in_two_processes(config, tmp_path / "config.json")
    assert losses(output) == whole
