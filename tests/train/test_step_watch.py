"""Losses and gradients that are not finite: stopped at, or left out."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from pyralis.errors import NotFiniteError
from pyralis.train.checkpoint import list_checkpoints, run_status
from pyralis.train.metric_rows import RunEvent, StepMetrics
from pyralis.train.metrics import read_metrics
from pyralis.train.nan_record import read_step
from tests.tiny import make_tiny_model
from tests.train.runs import WORDS, run

BAD = "Z"  # a letter that no good row has: the embedding of it is infinite in `poisoned`


def poison(folder: Path, name: str, row: int) -> None:
    path = folder / "model.safetensors"
    tensors = load_file(path)
    tensors[name][row, 0] = float("inf")
    save_file(tensors, path, metadata={"format": "pt"})


@pytest.fixture
def poisoned(tmp_path: Path) -> Path:
    from transformers import AutoTokenizer

    folder = make_tiny_model(tmp_path / "poisoned", tie_word_embeddings=False)
    (token,) = AutoTokenizer.from_pretrained(folder)(BAD, add_special_tokens=False)["input_ids"]
    poison(folder, "model.embed_tokens.weight", token)
    return folder


@pytest.fixture
def rows(tmp_path: Path) -> Callable[[int], Path]:
    """`rows(n)`: a file of 8 conversations; the first n have the bad letter."""

    def make(bad: int) -> Path:
        path = tmp_path / f"rows-{bad}.jsonl"
        answers = [f"{BAD}{i}" if i < bad else WORDS[i % len(WORDS)] for i in range(8)]
        turns = [[{"human": f"Say {i}", "assistant": answer}] for i, answer in enumerate(answers)]
        path.write_text("\n".join(json.dumps({"conversation": turn}) for turn in turns))
        return path

    return make


def events(output: Path, *names: str) -> list[RunEvent]:
    return [m for m in read_metrics(output / "metrics.jsonl") if isinstance(m, RunEvent) and m.event in names]


WAYS: dict[str, dict[str, Any]] = {
    "adapter": {},
    "whole, torch's optimizer": {"train_mode": "full"},
    "whole, the flat optimizer": {"train_mode": "full", "dtype": "bfloat16", "bf16": True},
    "in the backward": {"train_mode": "full", "dtype": "bfloat16", "bf16": True, "optimizer_in_bwd": True},
    "no clipping": {"max_grad_norm": 0.0},
    "accumulated": {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 1},
}


@pytest.mark.parametrize("way", WAYS)
def test_stop_names_the_row(poisoned: Path, rows: Callable[[int], Path], tmp_path: Path, way: str) -> None:
    output = tmp_path / "out"
    settings = {"max_steps": 4, "save_steps": 1, "save_strategy": "steps", "logging_steps": 5, "learning_rate": 1e-3}
    with pytest.raises(NotFiniteError) as caught:
        run(poisoned, rows(1), output, **(settings | WAYS[way]))
    message = str(caught.value)
    assert caught.value.exit_code == 1
    (folder,) = output.glob("nan-step-*")
    saved, batches, weights = read_step(folder)
    assert message.startswith(f"step {saved.step}: the loss is nan")
    assert f"{BAD}0" in saved.rows(most=2)
    assert f"pyralis replay {folder}" in message
    assert len(batches) == WAYS[way].get("gradient_accumulation_steps", 1)
    assert {"input_ids", "labels", "attention_mask"} <= batches[0].keys()
    assert bool(weights) == ("train_mode" not in WAYS[way])
    if way != "in the backward":
        assert saved.parameters
        assert saved.parameters[0] in message
    # every step before was saved, that one was not, and what was saved is whole
    assert [step for step, _ in list_checkpoints(output)] == list(range(1, saved.step))
    assert saved.checkpoint == (f"checkpoint-{saved.step - 1}" if saved.step > 1 else None)
    for _, checkpoint in list_checkpoints(output):
        for path in checkpoint.glob("*.safetensors"):
            assert all(bool(t.isfinite().all()) for k, t in load_file(path).items() if "embed_tokens" not in k)
    assert run_status(output) == "stopped"
    assert [event.step for event in events(output, "nan")] == [saved.step]
    assert f"Stopped at step {saved.step}" in (output / "report.html").read_text()


def test_the_row_is_found_in_the_prepared_data(poisoned: Path, rows: Callable[[int], Path], tmp_path: Path) -> None:
    with pytest.raises(NotFiniteError, match=r"row 0, "):
        run(poisoned, rows(1), tmp_path / "out", max_steps=4)


@pytest.mark.parametrize("way", [way for way in WAYS if way != "in the backward"])
def test_skip_leaves_the_step_out(poisoned: Path, rows: Callable[[int], Path], tmp_path: Path, way: str) -> None:
    output = tmp_path / "out"
    result = run(poisoned, rows(2), output, max_steps=4, logging_steps=1, on_nan="skip", **WAYS[way])
    skipped = events(output, "skipped")
    assert 1 <= len(skipped) <= 2
    assert len(result.summary.skipped) == len(skipped)
    assert all(BAD in event.message for event in skipped)
    assert result.status == "finished"
    assert result.summary.verdict.mood != "bad"
    assert not list(output.glob("nan-step-*"))
    for path in output.glob("*.safetensors"):
        assert all(bool(t.isfinite().all()) for k, t in load_file(path).items() if "embed_tokens" not in k)
    losses = {m.step: m.loss for m in read_metrics(output / "metrics.jsonl") if isinstance(m, StepMetrics)}
    first = skipped[0].step
    if WAYS[way].get("gradient_accumulation_steps", 1) == 1 and first > 1:
        assert losses[first] == losses[first - 1]


def test_more_than_ten_in_a_row_stop(poisoned: Path, rows: Callable[[int], Path], tmp_path: Path) -> None:
    output = tmp_path / "out"
    with pytest.raises(NotFiniteError, match=r"^11 steps in a row; the last of them, step 11: "):
        run(poisoned, rows(8), output, max_steps=20, on_nan="skip")
    assert [event.step for event in events(output, "skipped")] == list(range(1, 11))


def test_a_rate_far_too_high(tiny_llama: Path, chats: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    with pytest.raises(NotFiniteError, match="no checkpoint had been saved"):
        run(tiny_llama, chats, output, learning_rate=1e30, max_steps=8, save_strategy="no")
    (folder,) = output.glob("nan-step-*")
    saved, _, weights = read_step(folder)
    assert saved.step > 1
    assert max(float(t.abs().max()) for t in weights.values()) > 1e29  # the weights that it was computed with


def test_a_run_goes_on_from_the_checkpoint_before(poisoned: Path, rows: Callable[[int], Path], tmp_path: Path) -> None:
    output, settings = tmp_path / "out", {"max_steps": 4, "save_steps": 1, "save_strategy": "steps"}
    with pytest.raises(NotFiniteError):
        run(poisoned, rows(1), output, **settings)
    result = run(poisoned, rows(1), output, **settings, on_nan="skip")
    assert result.status == "finished"
    assert result.summary.skipped
    run(poisoned, rows(0), output, **settings, overwrite_output_dir=True)
    assert not list(output.glob("nan-step-*"))


def test_weights_and_curve_do_not_change_by_watching(tiny_llama: Path, chats: Path, tmp_path: Path) -> None:
    for mode in ("stop", "skip"):
        run(tiny_llama, chats, tmp_path / mode, on_nan=mode, logging_steps=1)
    one, other = (load_file(tmp_path / mode / "adapter_model.safetensors") for mode in ("stop", "skip"))
    assert all(torch.equal(one[name], other[name]) for name in one)
