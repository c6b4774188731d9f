"""Runs killed by SIGKILL at random moments, in saves too, end as runs left alone do: every loss, every tensor."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "tools"))
from chaos import chaos, differences

CASES: dict[str, dict[str, Any]] = {
    "lora": {"train_mode": "lora", "lora_dropout": 0.1},
    "qlora": {"train_mode": "qlora", "lora_dropout": 0.1},
    "full": {"train_mode": "full", "lora_dropout": 0.0},
    "packed": {"train_mode": "lora", "lora_dropout": 0.1, "packing": True},
    "documents": {"train_mode": "full", "task_type": "pretrain"},
    "streamed": {"train_mode": "full", "task_type": "pretrain", "streaming": True, "stream_buffer_size": 16},
    "accumulated": {"train_mode": "lora", "lora_dropout": 0.1, "gradient_accumulation_steps": 3},
}


def config(case: str, model: Path, data: Path, cache: Path, steps: int) -> dict[str, Any]:
    return {
        "model_name_or_path": str(model), "train_file": str(data), "max_seq_length": 96, "dtype": "float32",
        "lora_rank": 4, "max_steps": steps, "per_device_train_batch_size": 1, "learning_rate": 1e-2, "save_steps": 3,
        "save_total_limit": 2, "logging_steps": 1, "cache_dir": str(cache), **CASES[case],
    }  # fmt: skip


def check(case: str, model: Path, data: Path, folder: Path, kills: int, steps: int) -> None:
    outcome = chaos(config(case, model, data, folder / "cache", steps), folder, kills, seed=kills, say=lambda _: None)
    assert outcome.kills == kills, outcome
    assert not outcome.differences, outcome.differences[:5]
    assert any(outcome.resumed_steps), outcome


def test_three_kills(tiny_llama: Path, chats: Path, tmp_path: Path) -> None:
    check("lora", tiny_llama, chats, tmp_path, kills=3, steps=40)
    metrics = tmp_path / "killed" / "metrics.jsonl"  # and what differs is seen
    metrics.write_text(metrics.read_text().replace('"step": 7, "epoch"', '"step": 8, "epoch"'))
    assert differences(tmp_path / "whole", tmp_path / "killed")


@pytest.mark.full
@pytest.mark.parametrize("case", CASES)
def test_twenty_kills(case: str, tiny_llama: Path, chats: Path, documents: Path, tmp_path: Path) -> None:
    check(case, tiny_llama, documents if case in ("documents", "streamed") else chats, tmp_path, kills=20, steps=200)
