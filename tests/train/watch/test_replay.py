"""`pyralis replay`: a saved step says where it goes wrong."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from typer.testing import CliRunner

from pyralis.cli.main import build_app
from pyralis.errors import ConfigError, DataError, NotFiniteError
from pyralis.train.watch.non_finite import find_origin
from pyralis.train.watch.replay import Replay, replay
from tests.tiny import build_tiny_model, make_tiny_model
from tests.train.runs import run

INF = float("inf")


def stopped(model: Path, data: Path, output: Path, **values: Any) -> Path:
    with pytest.raises(NotFiniteError):
        run(model, data, output, **values)
    (folder,) = output.glob("nan-step-*")
    return folder


def stages(found: Replay) -> list[tuple[str, str]]:
    return [(str(one.dtype).removeprefix("torch."), one.origin.stage) for one in found.found]


@pytest.mark.parametrize("train_mode", ["lora", "full"])
def test_an_infinite_weight(tmp_path: Path, chats: Path, train_mode: str) -> None:
    model = make_tiny_model(tmp_path / "model")
    tensors = load_file(model / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][3, 5] = INF
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    folder = stopped(model, chats, tmp_path / "out", train_mode=train_mode)
    found = replay(folder)
    assert stages(found) == [("float32", "weight")]
    origin = found.found[0].origin
    assert origin.name.endswith("layers.1.mlp.up_proj.weight" if train_mode == "full" else "up_proj.base_layer.weight")
    assert "up_proj" in origin.words
    assert "holds values that are not finite" in origin.words
    assert "file is damaged" in found.advice()


def test_a_rate_far_too_high(tiny_llama: Path, chats: Path, tmp_path: Path) -> None:
    folder = stopped(tiny_llama, chats, tmp_path / "out", learning_rate=1e30, max_steps=8)
    found = replay(folder)
    assert found.weights == f"the weights of step {found.saved.step}"
    assert stages(found)[0][1] == "forward"
    assert "the first of all in the forward" in found.found[0].origin.words
    assert "Lower learning_rate" in found.advice()
    printed = CliRunner().invoke(build_app(), ["replay", str(folder)], catch_exceptions=False)
    assert printed.exit_code == 0
    assert "the first of all in the" in printed.stdout
    assert f"step {found.saved.step}, loss nan" in printed.stdout


def test_whole_models_go_from_the_checkpoint_before(tiny_llama: Path, chats: Path, tmp_path: Path) -> None:
    settings = {"train_mode": "full", "max_steps": 8, "learning_rate": 1e30}
    folder = stopped(tiny_llama, chats, tmp_path / "out", save_strategy="steps", save_steps=1, **settings)
    found = replay(folder)
    assert found.weights == f"the weights of {found.saved.checkpoint}"
    assert stages(found)[0][1] == "forward"
    folder = stopped(tiny_llama, chats, tmp_path / "without", save_strategy="no", **settings)
    found = replay(folder)
    assert found.weights == "the weights before training"
    assert stages(found) == [("float32", "nowhere")]
    assert "had diverged" in found.advice()


def test_it_runs_as_trained_too(tmp_path: Path, tiny_llama: Path, chats: Path) -> None:
    """A model whose hidden states leave float16's range, and a record that says it was trained so."""
    folder = stopped(tiny_llama, chats, tmp_path / "out", learning_rate=1e30, max_steps=8)
    record = tmp_path / "out" / "pyralis_run.json"
    record.write_text(json.dumps(json.loads(record.read_text()) | {"compute_dtype": "bfloat16"}))
    weights = load_file(folder / "weights.safetensors")
    save_file({name: tensor.clamp(-1, 1) for name, tensor in weights.items()}, folder / "weights.safetensors")
    assert stages(replay(folder)) == [("float32", "nowhere"), ("bfloat16", "nowhere")]


@pytest.fixture
def batch() -> dict[str, torch.Tensor]:
    ids = torch.arange(3, 19).reshape(2, 8)
    return {"input_ids": ids, "labels": ids.clone(), "attention_mask": torch.ones_like(ids)}


def test_float16_overflows_where_float32_does_not(batch: dict[str, torch.Tensor]) -> None:
    model = build_tiny_model("llama").eval()
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight.mul_(1e6)
    assert find_origin(model, batch, None).stage == "nowhere"
    origin = find_origin(model, batch, None, torch.float16)
    assert origin.stage in ("forward", "weight")
    assert origin.name.startswith("model.layers.1.mlp.down_proj")


def test_a_gradient_that_is_not_finite(batch: dict[str, torch.Tensor]) -> None:
    class Broken(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
            return gradient * INF

    class After(nn.Module):
        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return Broken.apply(self.inner(x))  # type: ignore[no-any-return]

    model = build_tiny_model("llama").eval()
    layer: Any = model.model.layers[0]
    layer.mlp = After(layer.mlp)
    origin = find_origin(model, batch, None)
    assert (origin.stage, origin.name) == ("gradient", "model.layers.0.mlp.inner.down_proj")


def test_what_happens_between_modules(batch: dict[str, torch.Tensor]) -> None:
    class Sum(nn.Module):
        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.inner(x) / 0.0

    model = build_tiny_model("llama").eval()
    layer: Any = model.model.layers[0]
    layer.mlp = Sum(layer.mlp)
    origin = find_origin(model, batch, None)
    assert (origin.stage, origin.name) == ("forward", "model.layers.0.mlp")
    assert "The modules inside it have finite outputs." in origin.words


def test_want_of_memory_is_no_fault_of_the_folder(
    tmp_path: Path, tiny_llama: Path, chats: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = stopped(tiny_llama, chats, tmp_path / "out", learning_rate=1e30, max_steps=8)

    def raises(*_: object) -> None:
        raise RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`")

    monkeypatch.setattr("pyralis.train.watch.replay.find_origin", raises)
    with pytest.raises(RuntimeError, match="ALLOC_FAILED"):
        replay(folder)


def test_what_is_no_saved_step(tmp_path: Path, tiny_llama: Path, chats: Path) -> None:
    with pytest.raises(DataError, match="is no saved step"):
        replay(tmp_path)
    folder = stopped(tiny_llama, chats, tmp_path / "out", learning_rate=1e30, max_steps=8)
    config = tmp_path / "out" / "pyralis_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"task_type": "dpo"}))
    with pytest.raises(ConfigError, match="steps of sft and pretrain"):
        replay(folder)
    config.unlink()
    with pytest.raises(DataError, match="Leave the saved step in the folder of its run"):
        replay(folder)


def test_a_folder_of_someone_else(tmp_path: Path, tiny_llama: Path, chats: Path) -> None:
    """Its config runs no code, its record leads nowhere else, and a batch that fits no model is named."""
    folder = stopped(tiny_llama, chats, tmp_path / "out", learning_rate=1e30, max_steps=8)
    output = folder.parent

    def refused(file: Path, match: str, error: type[Exception] = DataError, **changes: Any) -> None:
        whole = file.read_text()
        file.write_text(json.dumps(json.loads(whole) | changes))
        with pytest.raises(error, match=match):
            replay(folder)
        file.write_text(whole)

    config, record, step = output / "pyralis_config.json", output / "pyralis_run.json", folder / "step.json"
    refused(
        config, r"sets allow_pickle_weights, which can run code.* add --trust", ConfigError, allow_pickle_weights=True
    )
    refused(record, "compute_dtype is 'e'", compute_dtype="e")
    refused(record, r"rope_scaled_to \[1\]", rope_scaled_to=[1])
    refused(step, r"checkpoint is '\.\./\.\./checkpoint-1'", checkpoint="../../checkpoint-1")
    refused(step, "not whole numbers", step="7")
    refused(step, "a text and its number", micro_batches=[{"loss": 1, "num_items": 1, "rows": [{"text": 7}]}])
    config.write_text(json.dumps(json.loads(config.read_text()) | {"allow_pickle_weights": True}))
    assert replay(folder, trust=True).found
    config.write_text(json.dumps(json.loads(config.read_text()) | {"allow_pickle_weights": False}))
    batch = load_file(folder / "batch.safetensors")
    save_file({name: tensor + 10**6 for name, tensor in batch.items()}, folder / "batch.safetensors")
    with pytest.raises(DataError, match="the model cannot compute micro-batch 1"):
        replay(folder)
    record.write_text("[]")
    with pytest.raises(DataError, match="it holds a list"):
        replay(folder)
