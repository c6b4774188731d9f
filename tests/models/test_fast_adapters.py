"""PEFT's adapters on a fast model, put there before or after."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from peft import IA3Config, LoraConfig, get_peft_model

from pyralis.models.surgery import report, restore
from tests.models.fast_models import (
    CLOSE,
    Block,
    fast,
    fill_lora,
    give_lora,
    logits,
    reasons,
    step,
)
from tests.models.spec_block import CountedFused, block_in_place
from tests.tiny import build_tiny_model


@pytest.mark.parametrize("first", [True, False])
def test_peft_before_and_after(first: bool, block: Block) -> None:
    expected = give_lora(build_tiny_model())
    if first:
        model = give_lora(fast(build_tiny_model()))
    else:
        model = fast(give_lora(build_tiny_model()))
    torch.testing.assert_close(logits(model), logits(expected), **CLOSE)
    assert block.calls == 2
    with model.disable_adapter(), expected.disable_adapter():
        disabled = logits(model)
        torch.testing.assert_close(disabled, logits(expected), **CLOSE)
    assert not torch.allclose(disabled, logits(model), **CLOSE)
    for m in (model, expected):
        m.add_adapter("second", LoraConfig(target_modules=["up_proj"], r=8))
        fill_lora(m)
        m.set_adapter("second")
    torch.testing.assert_close(logits(model), logits(expected), **CLOSE)
    for m in (model, expected):
        m.set_adapter("default")
        m.merge_adapter()
    torch.testing.assert_close(logits(model), logits(expected), **CLOSE)
    for m in (model, expected):
        m.unmerge_adapter()
    torch.testing.assert_close(logits(model), logits(expected), **CLOSE)
    torch.testing.assert_close(logits(model.merge_and_unload()), logits(expected), **CLOSE)
    assert all(layer.fast for layer in report(model).layers)


def test_the_report_of_a_model_that_was_not_called() -> None:
    with block_in_place(CountedFused()) as block:
        model = give_lora(fast(build_tiny_model()))
        assert report(model).fast_layers == 2
        model = give_lora(fast(build_tiny_model()), alora_invocation_tokens=[1], layers_to_transform=[1])
        assert report(model).lines[0] == "1 of 2 layers fast"
        assert "ALora" in reasons(model)[1]
        assert block.calls == 0


def test_saved_adapters_are_the_same(tmp_path: Path, block: Block) -> None:
    model, stock = give_lora(fast(build_tiny_model())), give_lora(build_tiny_model())
    for m, name in ((model, "fast"), (stock, "stock")):
        m.save_pretrained(tmp_path / name)
    files = sorted(path.name for path in (tmp_path / "fast").iterdir())
    assert files == sorted(path.name for path in (tmp_path / "stock").iterdir())
    weights = "adapter_model.safetensors"
    assert (tmp_path / "fast" / weights).read_bytes() == (tmp_path / "stock" / weights).read_bytes()


def test_adapters_of_other_kinds_run_stock(block: Block) -> None:

    model = get_peft_model(
        fast(build_tiny_model()), IA3Config(target_modules=["down_proj"], feedforward_modules=["down_proj"])
    )
    logits(model)
    assert block.calls == 0
    assert "peft.tuners.ia3.layer.Linear" in reasons(model)[0]


def test_adapters_cast_as_trl_does(block: Block) -> None:
    """`param.data =` takes the adapter out of whatever buffer it was in, and its gradients' dtype with it."""
    model = fast(give_lora(build_tiny_model()))
    adapters = [p for p in model.parameters() if p.requires_grad]
    step(model)
    for dtype in (torch.bfloat16, torch.float32):
        model.zero_grad()
        for parameter in adapters:
            parameter.data = parameter.data.to(dtype)
        stock = give_lora(build_tiny_model())
        for parameter, cast in zip([p for p in stock.parameters() if p.requires_grad], adapters):
            parameter.data = cast.data.float()
        loss, gradients = step(model)
        assert {gradient.dtype for gradient in gradients.values()} == {dtype}
        assert loss == pytest.approx(step(stock)[0], rel=0.02)


def test_dropout(block: Block) -> None:
    model = fast(give_lora(build_tiny_model(), lora_dropout=0.5)).train()
    state = torch.get_rng_state()
    first, second = logits(model), logits(model)
    assert not torch.equal(first, second)
    torch.set_rng_state(state)  # as resuming does
    assert torch.equal(logits(model), first)
    restore(model)
    fast(model)
    assert torch.equal(logits(model), second)
    model.eval()
    assert torch.equal(logits(model), logits(model))
    torch.testing.assert_close(logits(model), logits(give_lora(build_tiny_model()).eval()), **CLOSE)
