"""Predicted bytes are those that a step really keeps: counted by storage, for every policy, family and base."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from bitsandbytes.nn import Linear4bit, Params4bit
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from pyralis.bench.train.architectures import MODELS
from pyralis.errors import ModelError
from pyralis.memory.footprint import kept_per_token, standing_bytes
from pyralis.memory.shape import Assumed, ModelShape, describe_model
from pyralis.models.checkpointing import choose_save_policy
from pyralis.models.fast_path import backbone_state
from pyralis.models.gradient_sums import GradientSums
from pyralis.models.policy import POLICIES, SavePolicy
from pyralis.models.residency import keep_matrices
from pyralis.models.surgery import accelerate, decoder_layers, report
from pyralis.ops._triton import Gpu
from tests.memory.live import LiveBytes
from tests.tiny import build_tiny_variant

GPU = Gpu((8, 0), 2)
ROWS, TOKENS = 2, 24
FAMILIES = ["llama", "llama-biases", "qwen3", "gemma3_text", "phi3", "granite"]
LORA = LoraConfig(r=8, target_modules="all-linear", init_lora_weights=False)


def build(name: str, *, four_bit: bool = False, lora: LoraConfig | None = LORA, **config: Any) -> Any:
    """A fast model without final norm, checkpointed, in training."""
    model: Any = build_tiny_variant(name, **config)
    if four_bit:
        for parent in list(model.model.layers.modules()):
            for child_name, child in list(parent.named_children()):
                if type(child) is nn.Linear:
                    setattr(parent, child_name, packed(child))
    if lora is not None:
        model = get_peft_model(model, copy.deepcopy(lora))
    assert accelerate(model).fast_layers == 2
    base = model.get_base_model() if lora is not None else model
    base.model.norm = nn.Identity()
    base.gradient_checkpointing_enable({"use_reentrant": False})
    base.train()
    return base


def packed(linear: nn.Linear) -> Linear4bit:
    layer = Linear4bit(
        linear.in_features, linear.out_features, linear.bias is not None, torch.float32, quant_type="nf4"
    )
    layer.weight = Params4bit(linear.weight.data, requires_grad=False, quant_type="nf4")
    layer.bias = linear.bias
    return layer.to("cpu")


def describe(base: Any) -> ModelShape:
    return describe_model(base, decoder_layers(base), GPU)


def kept_bytes(base: Any) -> int:
    """What the layers' forwards leave alive, the input of the first included, the output of the last not."""
    base.model(inputs_embeds=torch.randn(ROWS, TOKENS, 64))  # lays weights out
    with LiveBytes() as live:
        x = torch.randn(ROWS, TOKENS, 64, requires_grad=True)
        out = base.model(inputs_embeds=x).last_hidden_state
    assert report(base).fast_layers == 2
    head_dim = base.model.layers[0].self_attn.head_dim
    kinds = 2 if base.config.model_type == "gemma3_text" else 1
    angles = kinds * 2 * TOKENS * head_dim * 4
    multiplied = x.nbytes if base.config.model_type == "granite" else 0  # stock multiplies the embeddings
    return live.now() - out.nbytes - angles - multiplied


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_policy_keeps_what_is_predicted(family: str, policy: SavePolicy) -> None:
    base = build(family)
    shape = describe(base)
    choose_save_policy(decoder_layers(base), policy)
    expected = ROWS * TOKENS * sum(kept_per_token(layer, policy) for layer in shape.layers)
    if policy == "offload_input":  # on a CPU inputs stay where they are
        expected += ROWS * TOKENS * 64 * 4 * len(shape.layers)
    assert kept_bytes(base) == expected


def test_mixed_policies_add_up() -> None:
    base = build("llama")
    first, second = decoder_layers(base)
    choose_save_policy([first], "recompute_layer")
    choose_save_policy([second], "keep")
    shape = describe(base)
    expected = kept_per_token(shape.layers[0], "recompute_layer") + kept_per_token(shape.layers[1], "keep")
    assert kept_bytes(base) == ROWS * TOKENS * expected


@pytest.mark.parametrize("policy", POLICIES[:3])
@pytest.mark.parametrize(
    ("case", "lora"),
    [
        ("some layers", LoraConfig(r=8, target_modules=["q_proj", "down_proj"], init_lora_weights=False)),
        ("one layer", LoraConfig(r=4, target_modules=["k_proj", "up_proj"], layers_to_transform=[1])),
        ("wide", LoraConfig(r=64, target_modules="all-linear", init_lora_weights=False)),
        ("DoRA", LoraConfig(r=8, target_modules="all-linear", init_lora_weights=False, use_dora=True)),
        (
            "DoRA with dropout",
            LoraConfig(r=8, target_modules="all-linear", init_lora_weights=False, use_dora=True, lora_dropout=0.5),
        ),
        ("dropout", LoraConfig(r=8, target_modules="all-linear", init_lora_weights=False, lora_dropout=0.5)),
        ("full", None),
    ],
)
def test_what_is_trained_decides_what_is_kept(case: str, lora: LoraConfig | None, policy: SavePolicy) -> None:
    base = build("llama", lora=lora)
    shape = describe(base)
    choose_save_policy(decoder_layers(base), policy)
    where_masks_start = 32 if "dropout" in case else 0
    expected = ROWS * TOKENS * sum(kept_per_token(layer, policy) for layer in shape.layers) + where_masks_start
    assert kept_bytes(base) == expected


@pytest.mark.parametrize("resident", [False, True])
@pytest.mark.parametrize("family", ["llama", "qwen2", "phi3"])
def test_four_bit_weights_and_their_workspace(family: str, resident: bool) -> None:
    base = build(family, four_bit=True)
    layers = decoder_layers(base)
    keep_matrices(layers, resident)
    shape = describe(base)
    assert all(layer.four_bit and layer.made for layer in shape.layers)
    choose_save_policy(layers, "keep")
    assert kept_bytes(base) == ROWS * TOKENS * sum(kept_per_token(layer, "keep") for layer in shape.layers)

    weights = backbone_state(base.model).kept.weights
    own = [layer._bases[kind]._workspace for layer in weights.layers for kind in layer._bases]
    arenas = {id(buffer): buffer for workspace in own for buffer in workspace._buffers.values()}
    standing = standing_bytes(shape, (resident,) * 2, moments=8)
    assert standing.matrices == sum(buffer.nbytes for buffer in arenas.values())
    state = [group for layer in weights.layers for group in layer.state.groups]
    copies = sum(t.nbytes for group in state for t in (group.A, *(group.B or ())) if t is not None)
    adapters = sum(p.nbytes for name, p in base.named_parameters() if "lora_" in name)
    assert standing.adapters == adapters + copies
    gradients = weights.gradients
    assert standing.gradients == sum(b.nbytes for b in {gradients.view(p)._base for p in gradients.parameters})

    stored = 0
    for name, p in base.named_parameters():
        if "lora_" not in name:
            quantized = getattr(p, "quant_state", None)
            scales = (quantized.absmax, quantized.state2.absmax) if quantized is not None else ()
            stored += p.nbytes + sum(scale.nbytes for scale in scales)
    assert standing.weights == stored


def test_a_model_without_weights_is_described_alike() -> None:
    """What `pyralis plan` sees: on the meta device, before quantisation."""
    there = describe(build("llama", four_bit=True))
    with torch.device("meta"):
        model = get_peft_model(build_tiny_variant("llama"), copy.deepcopy(LORA))
    base: Any = model.get_base_model()
    assumed = Assumed(four_bit=True, dtype=torch.float32)
    planned = describe_model(base, decoder_layers(model), GPU, assumed=assumed)
    assert planned.layers == there.layers
    assert (planned.trained, planned.vocabulary) == (there.trained, there.vocabulary)
    assert planned.outside == there.outside + 64 * 4  # the final norm


@pytest.mark.parametrize("lora", [LORA, None], ids=["lora", "full"])
@pytest.mark.parametrize("family", ["llama-biases", "gemma2", "phi3"])
def test_sums_of_tiles(family: str, lora: LoraConfig | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the gradients in bfloat16 that an MLP in tiles sums in float32."""
    base, found = build(family, lora=lora).bfloat16(), []
    choose_save_policy(decoder_layers(base), "recompute_layer", 5)
    write = GradientSums.write_sums

    def counted(sums: GradientSums) -> None:
        found.append(sum(total.nbytes for _, total in sums._sums.values()))
        write(sums)

    monkeypatch.setattr(GradientSums, "write_sums", counted)
    base.model(inputs_embeds=torch.randn(1, TOKENS, 64, dtype=torch.bfloat16)).last_hidden_state.sum().backward()
    assert found[::-1] == [layer.tile_sums for layer in describe(base).layers]
    assert min(found) > 0


def test_llama_3_8b() -> None:
    """In bfloat16 over NF4, rank 16 on all projections, as docs/fused-layer.md has it."""
    fields = {**MODELS["llama3-8b"], "num_hidden_layers": 1}
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**fields))
        tuned = get_peft_model(model, LoraConfig(r=16, target_modules=["q_proj", "k_proj", "v_proj", "o_proj",
            "gate_proj", "up_proj", "down_proj"]))  # fmt: skip
    shape = describe_model(model, decoder_layers(tuned), Gpu((9, 0), 132), assumed=Assumed(four_bit=True))
    (layer,) = shape.layers
    assert [kept_per_token(layer, policy) for policy in POLICIES] == [111_272, 94_792, 8224, 32]
    assert layer.weights == 218_103_808
    assert layer.matrices / layer.weights == pytest.approx(2.04, abs=0.02)
    assert layer.stored / layer.weights == pytest.approx(0.516, abs=0.001)


def test_a_stock_layer_has_no_prediction() -> None:
    model = build_tiny_variant("gpt2")
    with pytest.raises(ModelError, match="layer 0 runs stock"):
        describe_model(model, decoder_layers(model), GPU)
