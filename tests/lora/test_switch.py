"""The model without its adapters, or with another, for a while: PEFT's own outputs, and nothing else touched."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, PromptTuningConfig, get_peft_model
from torch import Tensor

from pyralis.lora.switch import with_adapter, without_adapters
from tests.tiny import build_tiny_model

IDS = torch.arange(4, 24)[None]


def tuned(**settings: Any) -> PeftModel:
    config = LoraConfig(r=4, target_modules=["q_proj", "down_proj"], modules_to_save=["lm_head"], **settings)
    model = get_peft_model(build_tiny_model(), config)
    model.add_adapter("ref", config)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".default." in name or ".ref." in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return model.eval()


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        return model(input_ids=IDS).logits


def test_as_peft_has_it_with_everything_as_it_was() -> None:
    model = tuned()
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    on = logits(model)
    with model.disable_adapter():
        off = logits(model)
    model.set_adapter("ref")
    ref = logits(model)
    model.set_adapter("default")
    assert not torch.equal(off, on)
    assert not torch.equal(ref, on)
    with without_adapters(model):
        assert torch.equal(logits(model), off)
        assert [name for name, p in model.named_parameters() if p.requires_grad] == trained
    with with_adapter(model, "ref"):
        assert torch.equal(logits(model), ref)
        assert [name for name, p in model.named_parameters() if p.requires_grad] == trained
    assert torch.equal(logits(model), on)
    assert model.active_adapters == ["default"]
    with pytest.raises(KeyError), without_adapters(model):
        raise KeyError
    assert torch.equal(logits(model), on)


def test_merged_adapters_and_learnt_prompts_go_by_peft() -> None:
    model = tuned()
    with model.disable_adapter():
        off = logits(model)
    model.merge_adapter(["default"])
    with without_adapters(model):
        torch.testing.assert_close(logits(model), off, rtol=1e-5, atol=1e-5)
    prompts = get_peft_model(build_tiny_model(), PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3))
    with without_adapters(prompts):
        assert logits(prompts).shape[1] == IDS.shape[1]
