"""A live model written with its adapters merged: stock transformers reads it and computes what the live one does."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors import safe_open
from torch import Tensor
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from pyralis.errors import ModelError
from pyralis.export.merged_weights import merged_weights
from pyralis.export.write_model import parse_size, write_model
from pyralis.models.load import ModelSettings, load_model
from pyralis.models.nf4 import four_bit_layers
from pyralis.models.surgery import accelerate, report
from tests.tiny import FAMILIES, build_tiny_model, make_tiny_model

IDS = torch.arange(4, 4 + 2 * 24).reshape(2, 24) * 5 % 256 + 4
NF4 = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)


def live_model(folder: Path, family: str = "llama", bits: int | None = 4, tied: bool = False, **lora: Any) -> Any:
    """A model in training, fast where it can be, with an adapter that does something."""
    base = make_tiny_model(folder / "base", family, tie_word_embeddings=tied)
    mode: Any = "lora" if bits is None else "qlora"
    model = load_model(ModelSettings(str(base), mode, bits=bits or 4, dtype="float32")).model  # type: ignore[arg-type]
    accelerate(model)
    fan = {"fan_in_fan_out": True} if family == "gpt2" else {}
    tuned = get_peft_model(
        model, LoraConfig(**{"target_modules": "all-linear", "task_type": "CAUSAL_LM", **lora, **fan})
    )
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in tuned.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    return tuned.train()


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        return model.eval()(IDS, use_cache=False).logits.float()


def stock(folder: Path, **options: Any) -> Tensor:
    """Eager: transformers before 5.23 would take SDPA for Gemma 2, which leaves the softcap out."""
    options |= {"dtype": torch.float32, "attn_implementation": "eager"}
    return logits(AutoModelForCausalLM.from_pretrained(folder, **options))


@pytest.mark.parametrize("bits", [None, 4])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family(tmp_path: Path, family: str, bits: int | None) -> None:
    model = live_model(tmp_path, family, bits)
    expected = logits(model)
    write_model(model, tmp_path / "out", torch.float32)
    torch.testing.assert_close(stock(tmp_path / "out"), expected, atol=1e-4, rtol=0)
    assert "quantization_config" not in json.loads((tmp_path / "out" / "config.json").read_text())


@pytest.mark.parametrize("bits", [None, 4])
def test_the_live_model_stays_as_it_is(tmp_path: Path, bits: int | None) -> None:
    model = live_model(tmp_path, bits=bits)
    expected = logits(model)
    state = {name: tensor.clone() for name, tensor in model.state_dict().items() if isinstance(tensor, Tensor)}
    before = json.dumps(model.config.to_dict(), default=str)
    write_model(model, tmp_path / "out", torch.bfloat16)
    assert torch.equal(logits(model), expected)
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items() if name in state)
    assert json.dumps(model.config.to_dict(), default=str) == before
    assert report(model).fast_layers == 2
    model.train()(IDS, labels=IDS).loss.backward()  # goes on learning


KINDS: dict[str, dict[str, Any]] = {
    "rslora": {"use_rslora": True},
    "dora": {"use_dora": True},
    "bias": {"bias": "all"},
    "lora bias": {"lora_bias": True, "target_modules": ["q_proj", "k_proj"]},
    "some": {"target_modules": ["q_proj", "down_proj"], "layers_to_transform": [1]},
    "head": {"modules_to_save": ["lm_head"]},
    "embedding": {"modules_to_save": ["embed_tokens"]},
    "embedding adapted": {"target_modules": ["q_proj", "embed_tokens"]},
    "norms": {"modules_to_save": ["input_layernorm"]},
    "tokens": {"trainable_token_indices": [5, 6]},
}


@pytest.mark.filterwarnings("ignore:.*tied", "ignore:.*tie_word_embeddings")
@pytest.mark.parametrize(("tied", "bits"), [(False, 4), (True, None)])
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_adapter(tmp_path: Path, kind: str, tied: bool, bits: int | None) -> None:
    model = live_model(tmp_path, "qwen2", bits, tied, **KINDS[kind])
    expected = logits(model)
    write_model(model, tmp_path / "out", torch.float32)
    torch.testing.assert_close(stock(tmp_path / "out"), expected, atol=1e-4, rtol=0)


def test_eight_bits(tmp_path: Path) -> None:
    model = live_model(tmp_path, bits=8)
    expected = logits(model)  # activations are rounded to 8 bits as well there
    write_model(model, tmp_path / "out", torch.float32)
    assert (stock(tmp_path / "out") - expected).norm() < 0.05 * expected.norm()


def test_no_adapter(tmp_path: Path) -> None:
    model = build_tiny_model("gemma2")
    expected = logits(model)
    accelerate(model)
    logits(model)  # weights are laid out anew
    write_model(model, tmp_path, torch.float32)
    assert torch.equal(stock(tmp_path, attn_implementation="eager"), expected)


def test_adapters_that_peft_has_merged_are_not_merged_again(tmp_path: Path) -> None:
    model = live_model(tmp_path, bits=None)
    expected = logits(model)
    model.merge_adapter()
    write_model(model, tmp_path / "out", torch.float32)
    torch.testing.assert_close(stock(tmp_path / "out"), expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("bits", [None, 4])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_packed_again(tmp_path: Path, family: str, bits: int | None) -> None:
    """What transformers makes of the merged folder by quantising it, weight for weight."""
    model = live_model(tmp_path, family, bits)
    write_model(model, tmp_path / "merged", torch.bfloat16)
    write_model(model, tmp_path / "packed", torch.bfloat16, four_bit=NF4)
    expected = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", quantization_config=NF4, dtype=torch.bfloat16)
    found = AutoModelForCausalLM.from_pretrained(tmp_path / "packed", dtype=torch.bfloat16)
    assert len(list(four_bit_layers(found))) == len(list(four_bit_layers(expected))) > 0
    for (name, a), b in zip(four_bit_layers(found), dict(four_bit_layers(expected)).values()):
        assert torch.equal(a.weight.data, b.weight.data), name
        assert torch.equal(a.weight.quant_state.absmax, b.weight.quant_state.absmax), name
    torch.testing.assert_close(logits(found), logits(expected))


def test_experts_are_written_as_checkpoints_have_them(tmp_path: Path) -> None:
    fields = {"num_local_experts": 4, "num_experts_per_tok": 2}
    mixtral = build_tiny_mixtral(**fields)
    tuned = get_peft_model(mixtral, LoraConfig(target_modules=["q_proj"], init_lora_weights=False))
    expected = logits(tuned)
    write_model(tuned, tmp_path, torch.float32)
    torch.testing.assert_close(stock(tmp_path), expected, atol=1e-4, rtol=0)
    with safe_open(tmp_path / "model.safetensors", framework="pt") as weights:
        assert any(".experts.3.w1.weight" in name for name in weights.keys())  # noqa: SIM118


def build_tiny_mixtral(**fields: Any) -> Any:
    from transformers import MixtralConfig, MixtralForCausalLM

    torch.manual_seed(0)
    config = MixtralConfig(
        vocab_size=320, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, **fields,
    )  # fmt: skip
    return MixtralForCausalLM(config).eval()


def test_shards(tmp_path: Path) -> None:
    model = live_model(tmp_path)
    write_model(model, tmp_path / "whole", torch.float32)
    write_model(model, tmp_path / "parts", torch.float32, max_shard_size="100KB")
    shards = sorted((tmp_path / "parts").glob("*.safetensors"))
    assert [p.name for p in shards] == [
        f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))
    ]
    assert len(shards) > 2
    assert torch.equal(stock(tmp_path / "parts"), stock(tmp_path / "whole"))
    index = json.loads((tmp_path / "parts" / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"].values()) == {p.name for p in shards}


@pytest.mark.parametrize(("size", "expected"), [("5GB", 5 * 10**9), ("1.5MiB", 1572864), (300, 300), ("10 kb", 10**4)])
def test_sizes(size: str | int, expected: int) -> None:
    assert parse_size(size) == expected


@pytest.mark.parametrize("size", ["", "5XB", "-1GB", "0", "much"])
def test_sizes_that_are_none(size: str) -> None:
    with pytest.raises(ModelError, match="expected a size such as"):
        parse_size(size)


@pytest.mark.parametrize("bits", [None, 4])
def test_weights_that_are_not_finite(tmp_path: Path, bits: int | None) -> None:
    model = live_model(tmp_path, bits=bits)
    next(p for n, p in model.named_parameters() if "lora_B" in n).data[0, 0] = float("nan")
    with pytest.raises(ModelError, match="not all finite"):
        list(merged_weights(model, torch.float32))
