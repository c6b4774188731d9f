"""Adapters that cannot be: each is refused clearly, and nothing is left changed."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from pyralis.errors import ModelError
from pyralis.lora.adapter import load_adapter
from pyralis.lora.attach import LoraSettings, attach_lora
from pyralis.lora.record import TrainingRecord, write_record
from pyralis.models.load import ModelSettings, load_model
from tests.tiny import make_tiny_model

IDS = torch.arange(4, 52).reshape(2, 24)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"bias": "some"}, "bias .* is 'some'; expected none, all or lora_only"),
        ({"rank": "4"}, "r .* is '4'; expected a whole number"),
        ({"rank": 0}, "r .* is 0; expected a whole number, at least 1"),
        ({"dropout": 2}, "lora_dropout is 2; expected a number from 0"),
        ({"alpha": None}, "lora_alpha is None; expected a number"),
    ],
)
def test_values_that_no_adapter_can_have(settings: dict, message: str) -> None:
    with pytest.raises(ModelError, match=message):
        LoraSettings(**settings)


@pytest.mark.parametrize("mode", ["lora", "qlora"])
def test_a_model_is_as_it_was_where_attaching_fails(
    tmp_path: Path, mode: str, recwarn: pytest.WarningsRecorder
) -> None:
    """So that a cell of a notebook can be run again with its mistake mended."""
    model = load_model(ModelSettings(str(make_tiny_model(tmp_path)), mode, dtype="float32")).model
    names, before = [name for name, _ in model.named_modules()], model(IDS).logits
    learns = [p.requires_grad for p in model.parameters()]
    for wrong in (
        LoraSettings(rank=3, init_lora_weights="orthogonal"),  # fails when the first layer, or each, has its adapter
        LoraSettings(rank=4, may_change_base=True, init_lora_weights="nonsense", modules_to_save=("lm_head",)),
        LoraSettings(rank=4, more={"layer_replication": 3}),
    ):
        with pytest.raises(ModelError):
            attach_lora(model, wrong)
        assert [name for name, _ in model.named_modules()] == names
        assert not hasattr(model, "peft_config")
        assert [p.requires_grad for p in model.parameters()] == learns
    tuned = attach_lora(model, LoraSettings(rank=4, modules_to_save=("lm_head",)))
    assert torch.equal(tuned(IDS).logits, before)
    assert not [w for w in recwarn if "second time" in str(w.message) or "Already found" in str(w.message)]


@pytest.mark.parametrize("mode", ["lora", "qlora"])
def test_an_orthogonal_start_is_loaded_onto_packed_layers(tmp_path: Path, mode: str) -> None:
    settings = ModelSettings(str(make_tiny_model(tmp_path / "model")), mode, dtype="float32")
    tuned = attach_lora(load_model(settings).model, LoraSettings(rank=4, init_lora_weights="orthogonal"))
    tuned.save_pretrained(tmp_path / "adapter")
    packed = load_model(ModelSettings(settings.model_name_or_path, "qlora", dtype="float32")).model
    weights = attach_lora(packed, LoraSettings(), adapter=tmp_path / "adapter").state_dict()
    assert all(torch.equal(weights[n], p) for n, p in tuned.named_parameters() if "lora_" in n)


def test_an_adapter_of_another_architecture(tmp_path: Path) -> None:
    """Qwen2 has the names of Llama's layers, and here their shapes."""
    llama = load_model(ModelSettings(str(make_tiny_model(tmp_path / "llama")), "lora", dtype="float32")).model
    attach_lora(llama, LoraSettings(rank=4)).save_pretrained(tmp_path / "adapter")
    write_record(tmp_path / "adapter", TrainingRecord(model_type="llama"))
    other = load_model(ModelSettings(str(make_tiny_model(tmp_path / "qwen2", "qwen2")), "lora", dtype="float32")).model
    with pytest.raises(ModelError, match="trained on a llama model, and this is a qwen2 model"):
        load_adapter(other, tmp_path / "adapter")
