"""Training and inference in turns: what `generate` gives, and that training goes on as if nothing had been."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from pyralis import FastLanguageModel
from pyralis.api.origin import origin_of, set_origin
from pyralis.api.saving import bind_methods
from pyralis.models.checkpointing import save_policy
from pyralis.models.surgery import decoder_layers, report
from tests.api.models import IDS, load
from tests.tiny import make_tiny_model


@pytest.fixture
def llama(tmp_path: Path) -> Path:
    return make_tiny_model(tmp_path / "llama")


def test_modes(llama: Path) -> None:
    model, tokenizer = load(llama)
    model = FastLanguageModel.get_peft_model(model, r=4, lora_dropout=0.5, use_gradient_checkpointing="unsloth")
    model.config.use_cache = False  # as trainers leave it
    assert FastLanguageModel.for_inference(model) is model
    assert not any(module.training for module in model.modules())
    assert (tokenizer.padding_side, model.config.use_cache) == ("left", True)
    assert {save_policy(layer) for layer in decoder_layers(model)} == {"keep"}
    assert FastLanguageModel.for_training(model) is model
    assert all(module.training for module in model.modules())
    assert tokenizer.padding_side == "right"
    assert {save_policy(layer) for layer in decoder_layers(model)} == {"offload_input"}
    FastLanguageModel.for_training(model, use_gradient_checkpointing=True)
    assert {save_policy(layer) for layer in decoder_layers(model)} == {"recompute_layer"}
    FastLanguageModel.for_training(model, use_gradient_checkpointing=False)
    assert {save_policy(layer) for layer in decoder_layers(model)} == {"keep"}


def test_generation_is_stock_transformers_in_both_modes(llama: Path) -> None:
    model, tokenizer = load(llama, load_in_4bit=False)
    model = FastLanguageModel.get_peft_model(model, r=4)
    stock = AutoModelForCausalLM.from_pretrained(llama, dtype=torch.float32).eval()
    FastLanguageModel.for_inference(model)
    batch = tokenizer(["A longer question", "Short"], return_tensors="pt", padding=True)
    options: dict[str, Any] = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None}
    expected = stock.generate(**batch, **options)
    assert torch.equal(model.generate(**batch, **options), expected)
    FastLanguageModel.for_training(model)
    assert torch.equal(model.generate(**batch, **options), expected)  # without dropout the same


def test_training_goes_on_after_inference(llama: Path) -> None:
    losses = []
    for between in (False, True):
        model, _ = load(llama)
        model = FastLanguageModel.get_peft_model(model, r=4)
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 1e-2)
        for _ in range(3):
            FastLanguageModel.for_training(model)
            loss = model(IDS, labels=IDS).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            if between:
                FastLanguageModel.for_inference(model).generate(IDS, max_new_tokens=2, do_sample=False)
        losses.append(loss.item())
        model(IDS, use_cache=False)
        assert report(model).fast_layers == 2
    assert losses[0] == losses[1]


@pytest.mark.parametrize("saved", [["lm_head"], ["embed_tokens"], ["embed_tokens", "lm_head"]])
def test_modules_in_float32_over_half_precision_generate(llama: Path, saved: list[str]) -> None:
    model, _ = load(llama, load_in_4bit=False)
    model = model.to(torch.bfloat16)
    origin = origin_of(model)
    set_origin(model, replace(origin, record=replace(origin.record, dtype=torch.bfloat16)))
    model = FastLanguageModel.get_peft_model(model, r=4, modules_to_save=saved)
    assert {p.dtype for n, p in model.named_parameters() if "modules_to_save" in n} == {torch.float32}
    out = FastLanguageModel.for_inference(model).generate(IDS, max_new_tokens=4, do_sample=False, eos_token_id=None)
    assert out.shape == (2, 28)


def test_a_model_without_checkpointing_says_so(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, _ = load(llama)
    monkeypatch.setattr(type(model), "supports_gradient_checkpointing", False)
    said: list[str] = []
    monkeypatch.setattr("pyralis.api.modes.notice", said.append)
    FastLanguageModel.for_training(model, use_gradient_checkpointing=True)
    assert said == ["use_gradient_checkpointing has no effect: LlamaForCausalLM does not support it"]


def test_a_foreign_model_is_switched_too() -> None:
    from tests.tiny import build_tiny_model

    model = build_tiny_model()
    bind_methods(model)
    FastLanguageModel.for_training(model)
    assert model.training
    FastLanguageModel.for_inference(model)
    assert not model.training
