"""A fast model is the stock model to whoever looks at classes, copies, pickles, saves or loads it."""

from __future__ import annotations

import copy
import inspect
import io
import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

from pyralis.models.load import ModelSettings, load_model
from pyralis.models.surgery import report, restore
from pyralis.models.swap import FAST_STATE, STOCK_CLASS, is_fast, swap
from tests.models.fast_models import (
    CLOSE,
    IDS,
    Block,
    fast,
    give_lora,
    logits,
)
from tests.tiny import build_tiny_model, make_tiny_model


def test_restore_gives_stock_classes_back(block: Block) -> None:
    model = build_tiny_model()
    stock = [type(module) for module in model.modules()]
    logits(fast(model))
    assert restore(model) == 5
    assert [type(module) for module in model.modules()] == stock
    assert not any(FAST_STATE in vars(module) for module in model.modules())
    for parameter in model.parameters():
        assert parameter.untyped_storage().nbytes() == parameter.numel() * parameter.element_size()
    assert report(model).lines == ("2 of 2 layers stock: the model is not accelerated",)


def test_the_class_passes_for_the_stock_one(block: Block) -> None:
    model = build_tiny_model()
    keys = list(model.state_dict())
    stock = [type(model), type(model.model), type(model.model.layers[0])]
    fast(model)
    assert model._supports_logits_to_keep()
    for module, cls in zip((model, model.model, model.model.layers[0]), stock):
        assert isinstance(module, cls)
        assert type(module) is not cls
        assert (type(module).__name__, type(module).__qualname__) == (cls.__name__, cls.__qualname__)
        assert str(type(module)) == str(cls)
        assert "forward" in vars(type(module))
        assert "forward" not in vars(module)
        assert getattr(type(module), STOCK_CLASS) is cls
        assert inspect.signature(module.forward) == inspect.signature(cls.forward.__get__(module))
    assert list(model.state_dict()) == keys


def test_two_models_can_differ(block: Block) -> None:
    one, two = build_tiny_model(), build_tiny_model()
    fast(one)
    expected = logits(two)
    assert block.calls == 0
    torch.testing.assert_close(logits(one), expected, **CLOSE)
    assert block.calls == 2


def test_saving(tmp_path: Path, block: Block) -> None:
    model = fast(build_tiny_model())
    expected = logits(model)
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["architectures"] == ["LlamaForCausalLM"]
    model.model.save_pretrained(tmp_path / "decoder")
    assert json.loads((tmp_path / "decoder/config.json").read_text())["architectures"] == ["LlamaModel"]
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert not any(is_fast(module) for module in loaded.modules())
    torch.testing.assert_close(logits(loaded), expected, **CLOSE)


def test_deepcopy_and_pickle(block: Block) -> None:
    model = fast(give_lora(build_tiny_model()))
    expected = logits(model)
    saved = io.BytesIO()
    torch.save(model, saved)
    saved.seek(0)
    copies = {
        "deepcopy": copy.deepcopy(model),
        "pickle": pickle.loads(pickle.dumps(model)),
        "torch.save": torch.load(saved, weights_only=False),
    }
    for name, other in copies.items():
        assert not any(FAST_STATE in vars(module) for module in other.modules()), name
        calls = block.calls
        assert torch.equal(logits(other), expected), name
        assert block.calls == calls + 2, name
        nn.init.zeros_(other.get_submodule("base_model.model.model.layers.0.self_attn.q_proj").base_layer.weight)
        assert not torch.equal(logits(other), expected), name
        assert torch.equal(logits(model), expected), f"{name} shares weights with the original"
        assert restore(other) == 5


def test_deepcopy_of_four_bit_layers(tmp_path: Path, block: Block) -> None:
    folder = make_tiny_model(tmp_path)
    model = fast(give_lora(load_model(ModelSettings(str(folder), train_mode="qlora", dtype="float32")).model))
    expected = logits(model)
    other = copy.deepcopy(model)
    assert torch.equal(logits(other), expected)
    assert block.calls == 4
    packed = [m.get_submodule("base_model.model.model.layers.0.mlp.up_proj").weight for m in (model, other)]
    assert packed[0].data_ptr() != packed[1].data_ptr()
    assert packed[1].untyped_storage().nbytes() == packed[1].numel()


def test_a_class_that_checkpoints_in_call_does_not(block: Block) -> None:
    class Older(nn.Identity):  # as transformers 5.17's GradientCheckpointingLayer
        def __call__(self, *args: Any, **kwargs: Any) -> Any:
            raise AssertionError("checkpointed")

    module = Older()
    swap(module, double)
    assert module(torch.ones(1)) == 2


def double(module: nn.Module, x: Tensor) -> Tensor:
    return 2 * x


def test_data_types_and_moves(block: Block) -> None:
    model = fast(build_tiny_model())
    model.half().float()
    assert logits(model).dtype == torch.float32
    model.to(torch.float64)
    assert logits(model).dtype == torch.float64
    assert block.calls == 4


@pytest.mark.full
def test_hugging_faces_trainer_finds_its_columns(tmp_path: Path, block: Block) -> None:
    rows = [
        {"input_ids": row, "labels": row, "attention_mask": torch.ones(24), "other": i} for i, row in enumerate(IDS)
    ]
    losses = []
    for model in (build_tiny_model(), fast(build_tiny_model())):
        arguments = TrainingArguments(str(tmp_path), max_steps=2, report_to=[], use_cpu=True, logging_steps=1)
        trainer = Trainer(model, arguments, train_dataset=Dataset.from_list(rows))
        trainer.train()
        losses.append([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    assert block.calls == 4
