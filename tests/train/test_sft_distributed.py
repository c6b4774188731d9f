"""`accelerate launch` with two processes on the CPU: the losses of TRL's SFTTrainer, and of one process."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from pyralis.train.sft_trainer import SFTTrainer
from tests.train.sft_runs import CHATS, losses, trained

ROOT = Path(__file__).parents[2]


def launch(kind: str, out: Path) -> list[list[dict[str, Any]]]:
    # `--multi_gpu` is what launches several processes without MPI; they find no GPU (`use_cpu`) and take gloo.
    one_thread = ("--num_cpu_threads_per_process", "1", "--mixed_precision", "no", "--dynamo_backend", "no")
    processes = ("--multi_gpu", "--num_processes", "2", "--num_machines", "1", "--main_process_port", "0")
    worker = ("-m", "tests.train.sft_worker", kind, str(out))
    command = [sys.executable, "-m", "accelerate.commands.launch", *one_thread, *processes, *worker]
    paths = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, timeout=240, cwd=ROOT,
        env=os.environ | {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return [json.loads(line) for line in out.read_text().splitlines()]


@pytest.mark.full
def test_two_processes(tmp_path: Path) -> None:
    stock, ours = (launch(kind, tmp_path / f"{kind}.json") for kind in ("trl", "pyralis"))
    assert len(ours) == 2
    for run, expected in zip(ours, stock):
        for row, wanted in zip(run, expected, strict=True):
            assert row["loss"] == pytest.approx(wanted["loss"], rel=1e-6)
            assert row["grad_norm"] == pytest.approx(wanted["grad_norm"], rel=1e-5)
            assert row["num_tokens"] == wanted["num_tokens"]
    alone = trained(SFTTrainer, tmp_path, CHATS * 2, settings={"per_device_train_batch_size": 8})
    assert [row["loss"] for row in ours[0]] == pytest.approx(losses(alone), rel=1e-5)
