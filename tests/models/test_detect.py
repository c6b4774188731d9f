"""What a layer is said to be, and every way in which it is not that. That the specs are right, test_parity proves."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from peft import IA3Config, LoraConfig, get_peft_model
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from pyralis.models.detect import Reason, detect_layer, family_of
from pyralis.models.families import FAMILIES as SERVED
from pyralis.models.spec import LayerSpec, NormSpec, Projection
from pyralis.models.surgery import decoder_layers
from tests.tiny import VARIANTS, build_tiny_model, build_tiny_variant

CLASS_OF = {"gemma2": "Gemma 2", "gemma3_text": "Gemma 3", "phi3": "Phi-3"}


def specs(name: str, **config: Any) -> list[LayerSpec]:
    model = build_tiny_variant(name, **config)
    found = [detect_layer(layer, model.config) for layer in decoder_layers(model)]
    assert all(isinstance(spec, LayerSpec) for spec in found), found
    return found  # type: ignore[return-value]


def reason(layer: nn.Module, config: Any) -> str:
    found = detect_layer(layer, config)
    assert isinstance(found, Reason), found
    return str(found)


def test_llama() -> None:
    spec = specs("llama")[0]
    assert (spec.hidden_size, spec.intermediate_size, spec.rotary_dim, spec.activation) == (64, 128, 16, "silu")
    attention = spec.attention
    assert (attention.num_heads, attention.num_kv_heads, attention.head_dim, attention.scale) == (4, 2, 16, 0.25)
    assert (attention.window, attention.softcap, attention.causal) == (None, None, True)
    assert spec.input_norm == NormSpec("input_layernorm", 1e-6)
    assert spec.pre_mlp_norm == NormSpec("post_attention_layernorm", 1e-6)
    assert (spec.q_norm, spec.post_attention_norm, spec.post_mlp_norm, spec.residual_multiplier) == (
        None,
        None,
        None,
        1,
    )
    assert spec.qkv[1] == Projection("self_attn.k_proj", 32, 64, bias=False)
    assert [p.path for p in spec.gate_up] == ["mlp.gate_proj", "mlp.up_proj"]
    assert spec.down == Projection("mlp.down_proj", 64, 128)


def test_every_family_has_its_features() -> None:
    biased = specs("qwen2")[0]
    assert [p.bias for p in (*biased.qkv, biased.attention_out, biased.down)] == [True, True, True, False, False]
    qk_normed = specs("qwen3")[0]
    assert (qk_normed.q_norm, qk_normed.k_norm) == (
        NormSpec("self_attn.q_norm", 1e-6),
        NormSpec("self_attn.k_norm", 1e-6),
    )
    gemma = specs("gemma")[0]
    assert gemma.activation == "gelu_tanh"
    assert gemma.input_norm.unit_offset
    four = specs("gemma2")[0]
    assert [norm.path for norm in four.norms] == [
        "input_layernorm", "post_attention_layernorm", "pre_feedforward_layernorm", "post_feedforward_layernorm"
    ]  # fmt: skip
    assert four.attention.softcap == 50
    third = specs("gemma3_text")[0]
    assert third.attention.scale == pytest.approx(24**-0.5)
    assert third.q_norm == NormSpec("self_attn.q_norm", 1e-6, unit_offset=True)
    fused = specs("phi3-partial-rotary")[0]
    assert fused.qkv == (Projection("self_attn.qkv_proj", 128, 64),)
    assert fused.gate_up == (Projection("mlp.gate_up_proj", 256, 64),)
    assert fused.rotary_dim == 8
    granite = specs("granite")[0]
    assert (granite.residual_multiplier, granite.attention.scale) == (0.7, 0.2)
    assert specs("llama-gelu")[0].activation == "gelu"
    assert all(p.bias for p in specs("llama-biases")[0].projections)
    assert specs("llama-wide-heads")[0].attention.head_dim == 32


@pytest.mark.parametrize(
    ("name", "windows"),
    [
        ("mistral-window", [8, 8]), ("mistral-full", [None, None]), ("phi3-window", [8, 8]),
        ("qwen2", [None, None]), ("qwen2-windows", [None, 8]), ("qwen3-windows", [None, 8]),
        ("gemma2", [32, None]), ("gemma3_text", [32, None]),
    ],
)  # fmt: skip
def test_windows(name: str, windows: list[int | None]) -> None:
    assert [spec.attention.window for spec in specs(name)] == windows


@pytest.mark.parametrize("name", VARIANTS)
def test_every_variant_is_understood(name: str) -> None:
    assert len(specs(name)) == 2


def test_family_of() -> None:
    for name in ("llama", "gemma2", "gemma3_text", "phi3", "granite"):
        family = family_of(decoder_layers(build_tiny_model(name))[0])
        assert family is not None
        assert family.name == CLASS_OF.get(name, name.capitalize())
    assert family_of(nn.Linear(2, 2)) is None
    assert len({family.source for family in SERVED}) == len(SERVED)


def test_lora_and_four_bits_change_nothing() -> None:
    model = build_tiny_model()
    plain = detect_layer(decoder_layers(model)[0], model.config)
    tuned = get_peft_model(model, LoraConfig(target_modules=["q_proj", "down_proj"]))
    assert detect_layer(decoder_layers(tuned)[0], model.config) == plain
    bnb = pytest.importorskip("bitsandbytes")
    layer: Any = decoder_layers(build_tiny_model())[0]
    layer.mlp.up_proj = bnb.nn.Linear4bit(64, 128, bias=False)
    assert detect_layer(layer, model.config) == plain


@pytest.mark.parametrize(
    ("family", "fields", "expected"),
    [
        ("mixtral", {"num_local_experts": 2}, "a mixture of experts (MixtralDecoderLayer)"),
        ("qwen3_moe", {"num_experts": 2, "moe_intermediate_size": 32}, "a mixture of experts (Qwen3MoeDecoderLayer)"),
        ("olmo2", {}, "norms after attention and MLP only, and over all heads at once (Olmo2DecoderLayer)"),
        ("cohere", {}, "attention and MLP side by side, and interleaved RoPE (CohereDecoderLayer)"),
        ("starcoder2", {}, "an MLP without a gate (Starcoder2DecoderLayer)"),
        ("smollm3", {}, "there is no fast block for SmolLM3DecoderLayer yet"),
    ],
)
def test_other_models(family: str, fields: dict[str, Any], expected: str) -> None:
    sizes = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1, "vocab_size": 16, "pad_token_id": 0}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    config = AutoConfig.for_model(family, **sizes, **heads, **fields)
    model = AutoModelForCausalLM.from_config(config)
    assert reason(decoder_layers(model)[0], config) == expected


def test_bloom_and_gpt2() -> None:
    for family, expected in {"bloom": "ALiBi in place of RoPE", "gpt2": "learnt positions"}.items():
        model = build_tiny_model(family)
        assert expected in reason(decoder_layers(model)[0], model.config)


class Doubled(nn.Linear):
    """A subclass that computes something else."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return 2 * super().forward(input)


def replace_norm(layer: Any) -> None:
    layer.input_layernorm = nn.LayerNorm(64)


def replace_norm_size(layer: Any) -> None:
    layer.input_layernorm.weight = nn.Parameter(torch.ones(32))


def replace_forward(layer: Any) -> None:
    layer.mlp.forward = partial(type(layer.mlp).forward, layer.mlp)


def drop_module(layer: Any) -> None:
    del layer.mlp.up_proj


def add_parameter(layer: Any) -> None:
    layer.mlp.scale = nn.Parameter(torch.ones(1))


def add_weight(layer: Any) -> None:
    layer.mlp.up_proj.register_buffer("mask", torch.ones(1))


def set_infinite(layer: Any) -> None:
    layer.self_attn.scaling = float("inf")


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (replace_norm, "input_layernorm is torch.nn.modules.normalization.LayerNorm, not LlamaRMSNorm"),
        (replace_norm_size, "input_layernorm norms 32 features, not 64"),
        (replace_forward, "forward of mlp was replaced on the instance"),
        (drop_module, "mlp has no up_proj"),
        (add_parameter, "mlp has scale besides"),
        (add_weight, "mlp.up_proj has mask besides"),
        (set_infinite, "scaling is inf, not a number"),
        (lambda layer: setattr(layer, "adapter", nn.Identity()), "the layer has adapter besides"),
        (lambda layer: setattr(layer.mlp, "down_proj", Doubled(128, 64)), "Doubled, not Linear"),
        (lambda layer: setattr(layer.mlp, "down_proj", nn.Linear(128, 32)), "128 -> 32; the config asks for 128 -> 64"),
        (lambda layer: setattr(layer.mlp, "act_fn", nn.ReLU()), "the activation is torch.nn.modules.activation.ReLU"),
        (lambda layer: setattr(layer.self_attn, "attention_dropout", 0.1), "attention dropout of 0.1"),
        (lambda layer: setattr(layer.self_attn, "is_causal", False), "attention in both directions"),
        (lambda layer: setattr(layer.mlp.up_proj.weight, "data", torch.empty(0)), "it is kept elsewhere"),
    ],
)
def test_what_is_not_the_stock_layer(change: Callable[[Any], None], expected: str) -> None:
    model = build_tiny_model()
    layer = decoder_layers(model)[0]
    change(layer)
    assert expected in reason(layer, model.config)


@pytest.mark.parametrize(
    ("name", "config", "expected"),
    [
        ("phi3", {"resid_pdrop": 0.1}, "dropout of 0.1 on the residual stream"),
        ("llama", {"hidden_act": "relu"}, "the activation is"),
        ("llama", {"hidden_act": "gelu_new"}, "NewGELUActivation; SiLU, GELU and its tanh form are known"),
        ("gemma3_text", {"attn_logit_softcapping": 5.0}, "which Gemma 3's layers do not look at"),
        ("gemma", {"use_bidirectional_attention": True}, "attention in both directions"),
    ],
)
def test_what_a_config_asks_for(name: str, config: dict[str, Any], expected: str) -> None:
    model = build_tiny_model(name, **config)
    assert expected in reason(decoder_layers(model)[0], model.config)


def test_attention_functions() -> None:
    model = build_tiny_model("gemma2")
    layer = decoder_layers(model)[0]
    model.config._attn_implementation_internal = "sdpa"
    assert "SDPA, which leaves the softcap out" in reason(layer, model.config)
    model.config._attn_implementation_internal = "mine"
    assert reason(layer, model.config) == "attention by 'mine', which is not transformers' own"


def test_windows_that_disagree() -> None:
    model = build_tiny_variant("qwen2-windows")
    layer: Any = decoder_layers(model)[1]
    layer.self_attn.sliding_window = 4
    assert (
        reason(layer, model.config)
        == "layer_types says 'sliding_attention' and the layer 'sliding_attention', window 4"
    )


def test_classes_of_the_same_name_are_not_believed() -> None:
    model = build_tiny_model()
    layer = decoder_layers(model)[0]
    stock = type(layer)
    layer.__class__ = type(stock.__name__, (stock,), {"__module__": "transformers_modules.yi.modeling"})
    assert reason(layer, model.config) == "code that came with the checkpoint (LlamaDecoderLayer)"


def test_a_patched_class(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build_tiny_model()
    layer: Any = decoder_layers(model)[0]
    monkeypatch.setattr(type(layer.mlp), "forward", lambda self, x: x)
    assert reason(layer, model.config) == f"forward of LlamaMLP was replaced by {__name__}"


def test_other_adapters() -> None:
    model = build_tiny_model()
    config = IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"])
    tuned = get_peft_model(model, config)
    assert "has an adapter of PEFT's class peft.tuners.ia3.layer.Linear" in reason(
        decoder_layers(tuned)[0], model.config
    )
    model = build_tiny_model()
    tuned = get_peft_model(model, LoraConfig(target_modules=["q_proj"], modules_to_save=["input_layernorm"]))
    assert "ModulesToSaveWrapper, not LlamaRMSNorm" in reason(decoder_layers(tuned)[0], model.config)
