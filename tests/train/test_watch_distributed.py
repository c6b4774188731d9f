"""Two processes whose one has a row that is not finite: both stop, or both leave the step out."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from pyralis.train.report.metric_rows import RunEvent
from pyralis.train.report.metrics import read_metrics
from pyralis.train.watch.nan_record import read_step
from tests.train.poison import BAD, make_poisoned_model, make_rows


def launch(folder: Path, on_nan: str) -> subprocess.CompletedProcess[str]:
    model, data = make_poisoned_model(folder / "model"), make_rows(folder, 1)
    config = {
        "model_name_or_path": str(model), "train_file": str(data), "max_seq_length": 96, "train_mode": "lora",
        "lora_rank": 4, "lora_dropout": 0.0, "dtype": "float32", "max_steps": 4, "logging_steps": 1,
        "per_device_train_batch_size": 1, "cache_dir": str(folder / "cache"), "output_dir": str(folder / "out"),
        "train_sampling_strategy": "sequential", "on_nan": on_nan,
    }  # fmt: skip
    file = folder / "config.json"
    file.write_text(json.dumps(config))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    return subprocess.run(
        [*command, "-m", "pyralis", "train", str(file)], capture_output=True, text=True, check=False, timeout=120
    )


@pytest.mark.full
def test_both_stop(tmp_path: Path) -> None:
    done = launch(tmp_path, "stop")
    assert done.returncode != 0
    assert "step 1: the loss is nan" in done.stdout + done.stderr
    first, second = (read_step(tmp_path / "out" / name)[0] for name in ("nan-step-1", "nan-step-1-rank-1"))
    assert BAD in first.rows()
    assert BAD not in second.rows()


@pytest.mark.full
def test_both_leave_the_step_out(tmp_path: Path) -> None:
    done = launch(tmp_path, "skip")
    assert done.returncode == 0, done.stdout + done.stderr
    found = [m for m in read_metrics(tmp_path / "out" / "metrics.jsonl") if isinstance(m, RunEvent)]
    assert [m.step for m in found if m.event == "skipped"] == [1]
