"""Models made on the spot load like any other, and start from a loss that tells nothing yet."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer

from pyralis.bench.train import made_model as module
from pyralis.bench.train.architectures import MODELS
from pyralis.bench.train.made_model import made_model
from pyralis.bench.train.settings import MadeModel, Mode, Shape
from pyralis.bench.train.start import make_batch, put_back, snapshot, start_adapter
from pyralis.errors import ConfigError, ModelError
from tests.tiny import make_tiny_model

TIED = MODELS["tiny"] | {"tie_word_embeddings": True}


@pytest.fixture(autouse=True)
def _on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "compute_in", lambda: (torch.device("cpu"), torch.float32))


@pytest.fixture
def tied(monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setitem(MODELS, "tied", TIED)
    return "tied"


def loss_of(made: MadeModel) -> float:
    model = AutoModelForCausalLM.from_pretrained(made.folder)
    assert not model.training
    with torch.no_grad():
        return float(model(**make_batch(Shape(4, 64), made.facts.vocabulary)).loss)


@pytest.mark.parametrize("mode", ["qlora", "lora"])
@pytest.mark.parametrize("tie", [False, True])
def test_it_loads_and_starts_near_ln_v(mode: Mode, tie: bool, tied: str, tmp_path: Path) -> None:
    made = made_model(tied if tie else "tiny", mode, 4, tmp_path)
    assert made.quantized == (mode == "qlora")
    assert abs(loss_of(made) - math.log(made.facts.vocabulary)) < 0.3
    tokenizer = AutoTokenizer.from_pretrained(made.folder)
    assert tokenizer.decode(tokenizer("Größe")["input_ids"]) == "Größe"
    assert tokenizer.pad_token_id == 0


def test_it_is_made_once_and_quantising_is_all_that_modes_differ_in(tmp_path: Path) -> None:
    packed, plain = made_model("tiny", "qlora", 4, tmp_path), made_model("tiny", "lora", 4, tmp_path)
    changed = (packed.folder / "config.json").stat().st_mtime_ns
    assert made_model("tiny", "qlora", 4, tmp_path) == packed
    assert (packed.folder / "config.json").stat().st_mtime_ns == changed
    assert packed.facts == plain.facts
    assert abs(loss_of(packed) - loss_of(plain)) < 0.05


def test_every_layer_has_its_constants(tmp_path: Path) -> None:
    made = made_model("tiny", "qlora", 4, tmp_path)
    with safe_open(made.folder / "model.safetensors", "pt") as file:
        keys = set(file.keys())
    packed = [key.removesuffix(".absmax") for key in keys if key.endswith(".weight.absmax")]
    assert len(packed) == 2 * 7
    for key in packed:
        assert {f"{key}.{part}" for part in ("quant_map", "nested_absmax", "nested_quant_map")} <= keys
    assert "lm_head.weight.absmax" not in keys


def test_facts(tmp_path: Path) -> None:
    made = made_model("tiny", "qlora", 4, tmp_path)
    H, inner, kv, V = 128, 256, 64, 512
    layer = 2 * H * H + 2 * H * kv + 3 * H * inner
    assert made.facts.linear_parameters == 2 * layer + V * H
    assert made.facts.lora_parameters == 4 * 2 * (2 * (H + H) + 2 * (H + kv) + 3 * (H + inner))
    assert (made.facts.attention_features, made.facts.layers, made.facts.vocabulary) == (H, 2, V)
    assert made.attention == "sdpa"
    assert set(made.targets) == {f"{name}_proj" for name in ("q", "k", "v", "o", "gate", "up", "down")}


def test_a_folder(tmp_path: Path) -> None:
    folder = make_tiny_model(tmp_path / "gemma", "gemma2")
    made = made_model(str(folder), "qlora", 4, tmp_path)
    assert (made.folder, made.quantized, made.attention) == (folder, False, "eager")


def test_what_there_is_not(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"neither one of llama3-8b, .* nor a folder with a config\.json"):
        made_model("llama-9", "qlora", 4, tmp_path)
    packed = made_model("tiny", "qlora", 4, tmp_path)
    with pytest.raises(ConfigError, match="is quantised: only adapters can be trained on it"):
        made_model(str(packed.folder), "full", 4, tmp_path)


@pytest.mark.parametrize("name", sorted(MODELS))
def test_sizes_are_the_published_ones(name: str) -> None:
    """Billions of parameters, embeddings once."""
    from transformers import AutoConfig

    published = {
        "llama3-8b": 8.03, "qwen2-7b": 7.62, "mistral-7b": 7.25, "llama3.2-1b": 1.24, "qwen2-1.5b": 1.54,
        "gemma2-2b": 2.61, "tinyllama": 1.10, "tiny": 0.0004,
    }  # fmt: skip
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**MODELS[name]))
    model.tie_weights()
    assert sum(p.numel() for p in model.parameters()) / 1e9 == pytest.approx(published[name], rel=0.01, abs=1e-4)


def test_the_start_is_the_same_whatever_wraps_the_model(tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model

    made = made_model("tiny", "lora", 4, tmp_path)
    wrapped = []
    for _ in range(2):
        torch.manual_seed(len(wrapped))
        model = AutoModelForCausalLM.from_pretrained(made.folder)
        wrapped.append(get_peft_model(model, LoraConfig(r=4, target_modules=list(made.targets))))
    wrapped[1] = torch.nn.Sequential(wrapped[1])  # its names differ
    first, second = ([kept for _, kept in sorted(_started(model).items())] for model in wrapped)
    assert len(first) == 2 * 2 * 7
    for a, b in zip(first, second):
        assert torch.equal(a, b)
        assert torch.equal(a, a.bfloat16().float())
        assert a.std() > 0
    model = wrapped[0]
    kept = snapshot(model)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(1)
    put_back(model, kept)
    assert all(torch.equal(kept[name], value) for name, value in snapshot(model).items())


def _started(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    start_adapter(model)
    return snapshot(model)


def test_nothing_but_lora_is_started() -> None:
    with pytest.raises(ModelError, match=r"expected LoRA's weights alone to be trained, not weight, bias"):
        start_adapter(torch.nn.Linear(2, 2))


def test_batches_are_the_same_again_and_differ_between_shapes() -> None:
    first = make_batch(Shape(2, 8), 512)
    assert torch.equal(first["input_ids"], make_batch(Shape(2, 8), 512)["input_ids"])
    assert not torch.equal(first["input_ids"][:1], make_batch(replace(Shape(2, 8), batch=1), 512)["input_ids"])
    assert torch.equal(first["labels"], first["input_ids"])
    assert first["input_ids"].min() >= 4
