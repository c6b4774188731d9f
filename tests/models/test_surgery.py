"""What is made fast, and what is reported."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from pyralis.models import surgery
from pyralis.models.surgery import AccelerationReport, accelerate, decoder_backbone, decoder_layers, report, restore
from pyralis.models.swap import is_fast
from tests.models.fast_models import (
    EVERY,
    Block,
)
from tests.models.spec_block import block_in_place
from tests.tiny import FAMILIES, build_tiny_model


@pytest.mark.parametrize("family", FAMILIES)
def test_nothing_is_touched_that_is_not_proven(family: str, block: Block) -> None:
    model = build_tiny_model(family)
    classes = [type(module) for module in model.modules()]
    found = accelerate(model, families=())
    assert [layer.index for layer in found.layers] == [0, 1]
    assert found.fast_layers == 0
    assert found.lines[0].startswith("2 of 2 layers stock: ")
    assert [type(module) for module in model.modules()] == classes
    assert restore(model) == 0


def test_off_and_on(block: Block) -> None:
    model = build_tiny_model()
    assert accelerate(model, "off", families=EVERY).lines == ("2 of 2 layers stock: acceleration is off",)
    assert accelerate(model, "on", families=EVERY).lines == ("2 of 2 layers fast",)
    assert accelerate(model, "off").fast_layers == 0
    assert not any(is_fast(module) for module in model.modules())
    with pytest.raises(ValueError, match="expected 'auto', 'on' or 'off'"):
        accelerate(model, "fast")  # type: ignore[arg-type]


def test_without_a_block_all_is_stock() -> None:
    with block_in_place(None):
        model = build_tiny_model()
        assert accelerate(model, families=EVERY).lines == ("2 of 2 layers stock: there is no fused block",)


def test_a_gpu_on_which_no_kernel_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[torch.device] = []

    def unavailable(device: torch.device) -> str:
        asked.append(device)
        return "Triton cannot start kernels: why"

    monkeypatch.setattr(surgery, "unavailable", unavailable)
    assert accelerate(build_tiny_model()).fast_layers == 2  # a CPU needs none
    assert not asked
    layers = [SimpleNamespace(parameters=lambda: iter([SimpleNamespace(device=torch.device("cuda", 1))]))]
    monkeypatch.setattr(surgery, "decoder_layers", lambda model: layers)
    assert accelerate(build_tiny_model(), "on").lines == ("1 of 1 layers stock: Triton cannot start kernels: why",)
    assert asked == [torch.device("cuda", 1)]


def test_through_peft() -> None:
    model = build_tiny_model()
    layers = decoder_layers(model)
    tuned = get_peft_model(model, LoraConfig(target_modules=["q_proj"]))
    assert decoder_layers(tuned) == layers
    assert decoder_backbone(tuned) is model.model


def test_no_layers() -> None:
    assert accelerate(nn.Linear(2, 2)).lines == ("no decoder layers found: all stock",)
    assert report(nn.Linear(2, 2)).lines == AccelerationReport(()).lines


def test_layers_under_another_caller_stay_stock(block: Block) -> None:
    model = build_tiny_model()

    class Mine(type(model.model)):  # type: ignore[misc]
        """Goes through the layers in its own way, for all that is known."""

    model.model.__class__ = Mine
    assert accelerate(model, families=EVERY).lines == (
        "2 of 2 layers stock: the layers are called by Mine, which is not understood",
    )
