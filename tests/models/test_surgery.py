"""The seam reports truthfully, and changes nothing yet."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, get_peft_model

from pyralis.models.surgery import STOCK_CLASS, accelerate, decoder_layers, restore
from tests.tiny import FAMILIES, build_tiny_model

IDS = torch.arange(4, 28)[None]


@pytest.mark.parametrize("family", FAMILIES)
def test_every_layer_is_reported_and_none_is_touched(family: str) -> None:
    model = build_tiny_model(family)
    classes = [type(module) for module in model.modules()]
    before = model(IDS).logits
    report = accelerate(model, "auto")
    assert [layer.index for layer in report.layers] == [0, 1]
    assert report.fast_layers == 0
    assert report.lines[0].startswith("2 of 2 layers stock: there is no fast block for")
    assert [type(module) for module in model.modules()] == classes
    assert torch.equal(model(IDS).logits, before)
    assert restore(model) == 0


def test_off_and_on() -> None:
    model = build_tiny_model()
    assert accelerate(model, "off").lines == ("2 of 2 layers stock: acceleration is off",)
    assert "LlamaDecoderLayer" in accelerate(model, "on").lines[0]
    with pytest.raises(ValueError, match="expected 'auto', 'on' or 'off'"):
        accelerate(model, "fast")  # type: ignore[arg-type]


def test_through_peft() -> None:
    model = build_tiny_model()
    layers = decoder_layers(model)
    assert decoder_layers(get_peft_model(model, LoraConfig(target_modules=["q_proj"]))) == layers


def test_no_layers() -> None:
    assert accelerate(torch.nn.Linear(2, 2)).lines == ("no decoder layers found: all stock",)


def test_restore_gives_stock_classes_back() -> None:
    model = build_tiny_model()
    layer = decoder_layers(model)[0]
    stock = type(layer)
    layer.__class__ = type(stock.__name__, (stock,), {STOCK_CLASS: stock})
    assert restore(model) == 1
    assert type(layer) is stock
