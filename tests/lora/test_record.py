"""What a run left beside its adapter says how its base model was loaded."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from pyralis.errors import ModelError
from pyralis.lora.record import TrainingRecord, read_record, write_record


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({}, TrainingRecord()),
        ({"pyralis_config.json": {"train_mode": "lora"}}, TrainingRecord()),
        (
            {"pyralis_config.json": {"train_mode": "qlora", "double_quant": False, "quant_type": "fp4"}},
            TrainingRecord(True, "fp4", False),
        ),
        ({"pyralis_config.json": {"train_mode": "qlora", "fp16": True}}, TrainingRecord(True, dtype=torch.float16)),
        ({"pyralis_config.json": {"dtype": "bfloat16"}}, TrainingRecord(dtype=torch.bfloat16)),
        (
            {
                "pyralis_config.json": {"train_mode": "qlora", "bf16": True},
                "pyralis_run.json": {"status": "finished", "compute_dtype": "float32"},
            },
            TrainingRecord(True),
        ),
        (
            {"pyralis_run.json": {"rope_scaled_to": 4096}, "pyralis_config.json": {"max_seq_length": 4096}},
            TrainingRecord(rope_scaled_to=4096),
        ),
    ],
)
def test_record(tmp_path: Path, files: dict[str, dict[str, Any]], expected: TrainingRecord) -> None:
    for name, content in files.items():
        (tmp_path / name).write_text(json.dumps(content))
    assert read_record(tmp_path) == expected


@pytest.mark.parametrize(
    "record",
    [
        TrainingRecord(),
        TrainingRecord(True, "fp4", False, torch.bfloat16, 4096, {"rope_type": "linear", "factor": 2.0}),
    ],
)
def test_a_record_is_read_as_it_was_written(tmp_path: Path, record: TrainingRecord) -> None:
    write_record(tmp_path, record)
    assert read_record(tmp_path) == record


@pytest.mark.parametrize("values", [{"rope_scaled_to": [1]}, {"rope_scaled_to": "64"}, {"rope_scaling_given": "x"}])
def test_a_damaged_record(tmp_path: Path, values: dict[str, Any]) -> None:
    (tmp_path / "pyralis_adapter.json").write_text(json.dumps(values))
    with pytest.raises(ModelError, match=r"its record .* is damaged"):
        read_record(tmp_path)
