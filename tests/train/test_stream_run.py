"""Continued pretraining: runs over streams and mixtures, resumed in the middle, embeddings and head trained."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from pyralis.errors import ConfigError
from pyralis.train.checkpoints.checkpoint import RUN_NAME, write_json
from pyralis.train.config.train_config import config_from_dict
from pyralis.train.stream_trainer import POSITION_NAME
from tests.train.runs import run

STREAM: dict[str, Any] = {
    "task_type": "pretrain", "streaming": True, "stream_buffer_size": 4, "max_seq_length": 48, "max_steps": 8,
    "save_strategy": "steps", "save_steps": 3, "logging_steps": 1, "save_total_limit": 5,
}  # fmt: skip


def losses(folder: Path) -> dict[int, float]:
    rows = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return {row["step"]: row["loss"] for row in rows if row["kind"] == "train"}


def stopped_after(folder: Path, step: int) -> None:
    """As if the run had been killed later than its checkpoint, and before the next one."""
    record = json.loads((folder / RUN_NAME).read_text())
    write_json(folder / RUN_NAME, record | {"status": "interrupted"})
    for checkpoint in folder.glob("checkpoint-*"):
        if int(checkpoint.name.split("-")[1]) > step:
            checkpoint.rename(folder / f"gone-{checkpoint.name}")


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(next(folder.glob("*.safetensors")))


@pytest.mark.parametrize(
    "options",
    [
        {"train_mode": "full", "learning_rate": 1e-3},
        {"lora_dropout": 0.1, "gradient_accumulation_steps": 2},
        pytest.param(
            {"train_mode": "full", "learning_rate": 1e-3, "dtype": "bfloat16", "bf16_update": "stochastic"},
            marks=pytest.mark.full,
        ),
        pytest.param({"source_weights": [3, 1], "per_device_train_batch_size": 3}, marks=pytest.mark.full),
    ],
    ids=["full", "dropout and accumulation", "bfloat16", "weights"],
)
def test_a_stream_resumed_in_the_middle_gives_the_same_losses(
    options: dict[str, Any], tiny_llama: Path, documents: Path, tmp_path: Path
) -> None:
    files = [str(documents / "a.jsonl"), str(documents / "b.jsonl")]
    whole, parted = tmp_path / "whole", tmp_path / "parted"
    for folder in (whole, parted):
        run(tiny_llama, documents, folder, **STREAM | options, train_file=files)
    assert losses(whole) == losses(parted)
    assert len(losses(whole)) == 8
    stopped_after(parted, 6)
    saved = (parted / "checkpoint-6" / POSITION_NAME).stat().st_mtime_ns
    run(tiny_llama, documents, parted, **STREAM | options, train_file=files)
    assert losses(parted) == losses(whole)
    assert (parted / "checkpoint-6" / POSITION_NAME).stat().st_mtime_ns == saved, "resumed, not begun anew"
    expected = weights_of(whole)
    for name, found in weights_of(parted).items():
        assert torch.equal(found, expected[name]), name


def test_a_mixture_resumed_in_the_middle_gives_the_same_losses(
    tiny_llama: Path, documents: Path, tmp_path: Path
) -> None:
    files = [str(documents / "a.jsonl"), str(documents / "b.jsonl")]
    options = STREAM | {"streaming": False, "stream_buffer_size": 1024, "source_weights": [1, 3]}
    whole, parted = tmp_path / "whole", tmp_path / "parted"
    for folder in (whole, parted):
        run(tiny_llama, documents, folder, **options, train_file=files)
    stopped_after(parted, 3)
    run(tiny_llama, documents, parted, **options, train_file=files)
    assert losses(parted) == losses(whole)


@pytest.mark.parametrize("train_mode", ["lora", "qlora"])
def test_embeddings_and_head_are_trained_at_their_own_rate(
    train_mode: str, tiny_llama: Path, documents: Path, tmp_path: Path
) -> None:
    saved = {}
    for rate in (0.0, 1e-3):
        folder = tmp_path / f"{rate}"
        run(
            tiny_llama, documents, folder, **STREAM | {"max_steps": 2, "save_strategy": "no"}, train_mode=train_mode,
            modules_to_save=["embed_tokens", "lm_head"], embedding_learning_rate=rate, weight_decay=0.0,
        )  # fmt: skip
        saved[rate] = weights_of(folder)
    before = load_file(tiny_llama / "model.safetensors")
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        still, moved = (saved[rate][f"base_model.model.{name}"] for rate in (0.0, 1e-3))
        assert torch.equal(still.float(), before[name].float()), name
        step = (moved.float() - before[name].float()).abs().max()
        assert 1e-4 < float(step) < 2.5e-3, name
    lora = next(name for name in saved[0.0] if "lora_B" in name)
    assert saved[0.0][lora].abs().max() > 0


def test_a_position_that_is_gone_is_said(tiny_llama: Path, documents: Path, tmp_path: Path) -> None:
    folder = tmp_path / "out"
    run(tiny_llama, documents, folder, **STREAM | {"max_steps": 4})
    stopped_after(folder, 3)
    for path in (folder / "checkpoint-3").glob("*sums*"):
        path.unlink()  # of a checkpoint whose files are checked
    (folder / "checkpoint-3" / POSITION_NAME).unlink()
    with pytest.raises(ConfigError, match=POSITION_NAME):
        run(tiny_llama, documents, folder, **STREAM | {"max_steps": 4})


CONFIG = {"model_name_or_path": "m", "train_file": ["a", "b"], "max_seq_length": 64, "task_type": "pretrain"}


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"source_weights": [1.0]}, "expected 2 numbers above 0"),
        ({"source_weights": [1.0, 0.0]}, "expected 2 numbers above 0"),
        ({"streaming": True}, "by max_steps"),
        ({"streaming": True, "max_steps": 5, "packing": False}, "is for packed text"),
        ({"streaming": True, "max_steps": 5, "task_type": "sft", "packing": True}, "is for packed text"),
        ({"streaming": True, "max_steps": 5, "eval_split": 0.1}, "give eval_file"),
        ({"streaming": True, "max_steps": 5, "max_samples": 10}, "max_samples: 10"),
        ({"streaming": True, "max_steps": 5, "dataloader_num_workers": 2}, "set it to 0"),
    ],
)
def test_what_does_not_go_together(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        config_from_dict(CONFIG | values)


def test_what_has_no_effect_is_said() -> None:
    notes = config_from_dict(CONFIG | {"stopping_strategy": "first_exhausted", "stream_buffer_size": 5}).notes
    assert any("stopping_strategy: has no effect" in note for note in notes)
    assert any("stream_buffer_size: has no effect" in note for note in notes)
