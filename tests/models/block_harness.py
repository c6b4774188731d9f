"""Tiny decoders run by the fused block and by stock transformers, with explicit masks, for comparison."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn

from pyralis.models.block import fused_layer
from pyralis.models.group_state import LayoutOptions
from pyralis.models.model_weights import ModelWeights
from pyralis.models.policy import InputStore, SavePolicy
from pyralis.models.spec import Activation, AttentionSpec, LayerSpec, NormSpec, Projection
from pyralis.ops.attention_spec import AttentionLayout
from tests.tiny import build_tiny_model

WINDOW = 5
# family -> fields of its config
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "llama-biases": {"attention_bias": True, "mlp_bias": True, "hidden_act": "gelu"},
    "mistral": {"sliding_window": WINDOW},
    "qwen2": {},
    "qwen3": {},
    "gemma": {},
    "gemma2": {"sliding_window": WINDOW, "attn_logit_softcapping": 2.0},
    "gemma3_text": {"sliding_window": WINDOW, "layer_types": ["sliding_attention", "full_attention"]},
    "phi3": {"partial_rotary_factor": 0.5},
    "granite": {"residual_multiplier": 0.7, "attention_multiplier": 0.2},
}
ACTIVATIONS: dict[str, Activation] = {"silu": "silu", "gelu_pytorch_tanh": "gelu_tanh", "gelu": "gelu"}
ALL = LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", init_lora_weights=False)
DORA = LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", init_lora_weights=False, use_dora=True)


def build(family: str, lora: LoraConfig | None = ALL, *, seed: int = 0) -> Any:
    """A decoder model in float32, with random LoRA on it; stock attention is eager, which takes any mask."""
    model = build_tiny_model(family.partition("-")[0], seed=seed, attn_implementation="eager", **FAMILIES[family])
    if lora is None:
        return model
    torch.manual_seed(seed + 1)
    tuned = get_peft_model(model, copy.deepcopy(lora))
    with torch.no_grad():
        for name, parameter in tuned.named_parameters():
            if "lora_magnitude_vector" in name:  # starts as the norm that it is divided by
                parameter.mul_(0.7 + 0.6 * torch.rand_like(parameter))
    return tuned


def decoder(model: Any) -> Any:
    return (model.get_base_model() if isinstance(model, PeftModel) else model).model


def spec_of(layer: Any, config: Any, window: int | None) -> LayerSpec:
    """The spec of a stock layer, by the names of its modules."""
    gemma = config.model_type.startswith("gemma")
    four = hasattr(layer, "pre_feedforward_layernorm")
    attention, hidden, inner = layer.self_attn, config.hidden_size, config.intermediate_size
    head_dim = attention.head_dim
    heads, kv = config.num_attention_heads * head_dim, config.num_key_value_heads * head_dim

    def norm(path: str) -> NormSpec:
        return NormSpec(path, config.rms_norm_eps, unit_offset=gemma)

    def linear(path: str, out: int, inputs: int) -> Projection:
        return Projection(path, out, inputs, layer.get_submodule(path).bias is not None)

    qkv = [(f"self_attn.{name}_proj", width) for name, width in (("q", heads), ("k", kv), ("v", kv))]
    gate_up = [("mlp.gate_proj", inner), ("mlp.up_proj", inner)]
    if config.model_type == "phi3":
        qkv, gate_up = [("self_attn.qkv_proj", heads + 2 * kv)], [("mlp.gate_up_proj", 2 * inner)]
    has_qk_norm = hasattr(attention, "q_norm")
    return LayerSpec(
        hidden,
        inner,
        AttentionSpec(
            config.num_attention_heads, config.num_key_value_heads, head_dim, attention.scaling, window=window,
            softcap=getattr(config, "attn_logit_softcapping", None),
        ),
        int(head_dim * (config.rope_parameters.get("partial_rotary_factor") or 1)),
        norm("input_layernorm"),
        norm("pre_feedforward_layernorm" if four else "post_attention_layernorm"),
        ACTIVATIONS[getattr(config, "hidden_activation", None) or config.hidden_act],
        tuple(linear(path, width, hidden) for path, width in qkv),
        linear("self_attn.o_proj", hidden, heads),
        tuple(linear(path, width, hidden) for path, width in gate_up),
        linear("mlp.down_proj", hidden, inner),
        q_norm=norm("self_attn.q_norm") if has_qk_norm else None,
        k_norm=norm("self_attn.k_norm") if has_qk_norm else None,
        post_attention_norm=norm("post_attention_layernorm") if four else None,
        post_mlp_norm=norm("post_feedforward_layernorm") if four else None,
        residual_multiplier=getattr(config, "residual_multiplier", 1.0),
    )  # fmt: skip


def specs_of(model: Any) -> list[LayerSpec]:
    backbone = decoder(model)
    found = []
    for index, layer in enumerate(backbone.layers):
        kinds = getattr(backbone.config, "layer_types", None)
        sliding = backbone.config.model_type == "mistral" or (kinds and kinds[index] == "sliding_attention")
        found.append(spec_of(layer, backbone.config, backbone.config.sliding_window if sliding else None))
    return found


@dataclass(frozen=True)
class Batch:
    """x, dy: [B, S, H] float64. documents: [B, S], tokens see their own alone. real: [B, S], False for padding."""

    x: Tensor
    dy: Tensor
    documents: Tensor
    positions: Tensor
    real: Tensor
    layout: AttentionLayout

    def visible(self, window: int | None) -> Tensor:
        i = torch.arange(self.x.shape[1])
        near = (i[:, None] >= i) & (i[:, None] - i < (window or len(i)))
        return near & (self.documents[:, :, None] == self.documents[:, None, :])


def make_batch(kind: str, *, seed: int = 0) -> Batch:
    """kind: "full", "right" or "left" (padded), "packed"."""
    generator = torch.Generator().manual_seed(seed)
    rows, tokens = (1, 25) if kind == "packed" else (2, 13)
    x, dy = torch.randn((2, rows, tokens, 64), generator=generator, dtype=torch.float64)
    index = torch.arange(tokens).expand(rows, -1)
    documents, positions, layout = torch.zeros_like(index), index, AttentionLayout.padded(rows, tokens)
    real = torch.ones(rows, tokens, dtype=torch.bool)
    if kind == "right":
        real = index < torch.tensor([[tokens], [tokens - 4]])
    elif kind == "left":
        starts = torch.tensor([0, 4])
        real = index >= starts[:, None]
        positions = (index - starts[:, None]).clamp(min=0)
        layout = AttentionLayout.left_padded(starts, tokens)
    elif kind == "packed":
        bounds = torch.tensor([0, 9, 10, 25], dtype=torch.int32)
        documents = torch.searchsorted(bounds[1:], index.int().contiguous(), right=True)
        positions = index - bounds[documents]
        layout = AttentionLayout.packed(bounds, 15, tokens)
    documents = torch.where(real, documents, -1)
    return Batch(x, dy * real[..., None], documents, positions, real, layout)


def angles(backbone: Any, index: int, x: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
    if backbone.config.model_type == "gemma3_text":
        return backbone.rotary_emb(x, positions, backbone.config.layer_types[index])
    return backbone.rotary_emb(x, positions)


@dataclass(frozen=True)
class Result:
    y: Tensor
    dx: Tensor
    grads: dict[str, Tensor]


def stock_forward(model: Any, x: Tensor, batch: Batch, specs: Sequence[LayerSpec]) -> Tensor:
    """Layer by layer, by stock's own modules."""
    backbone = decoder(model)
    for index, (layer, spec) in enumerate(zip(backbone.layers, specs)):
        hidden_keys = ~batch.visible(spec.attention.window)[:, None]
        mask = torch.zeros(hidden_keys.shape, dtype=x.dtype).masked_fill_(hidden_keys, torch.finfo(x.dtype).min)
        x = layer(
            x, position_embeddings=angles(backbone, index, x, batch.positions), attention_mask=mask,
            position_ids=batch.positions,
        )  # fmt: skip
    return x


def run_stock(model: Any, batch: Batch, *, dtype: torch.dtype, specs: Sequence[LayerSpec]) -> Result:
    x = batch.x.to(dtype, copy=True).requires_grad_()
    return _finish(model, stock_forward(model, x, batch, specs), x, batch)


class Fused:
    """A model's layers through the fused block."""

    def __init__(self, model: Any, *, options: LayoutOptions | None = None, seed: int = 0) -> None:
        self.model, self.backbone, self.specs = model, decoder(model), specs_of(model)
        options = LayoutOptions(concatenate=True) if options is None else options
        self.autocast: torch.dtype | None = None
        self.weights = ModelWeights(list(zip(self.backbone.layers, self.specs)), options=options, seed=seed)

    def forward(
        self, x: Tensor, batch: Batch, policy: SavePolicy = "keep", *, refresh: bool = True,
        store: InputStore | None = None, tile: int | None = None,
    ) -> Tensor:  # fmt: skip
        if refresh:
            assert self.weights.refresh(self.autocast) == [None] * len(self.specs)
        for index, layer in enumerate(self.weights.layers):
            x = fused_layer(
                x, *angles(self.backbone, index, x, batch.positions), batch.layout, layer, self.weights.gradients,
                policy=policy, rng=self.weights.rng, store=store, tile=tile,
            )  # fmt: skip
        return x

    def run(
        self, batch: Batch, policy: SavePolicy = "keep", *, dtype: torch.dtype = torch.float32, **rest: Any
    ) -> Result:
        x = batch.x.to(dtype, copy=True).requires_grad_()
        return _finish(self.model, self.forward(x, batch, policy, **rest), x, batch)


def _finish(model: Any, y: Tensor, x: Tensor, batch: Batch) -> Result:
    y.backward(batch.dy.to(y.dtype))
    grads = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    assert x.grad is not None
    return Result(y.detach(), x.grad, grads)


def truth_of(model: Any, batch: Batch) -> Result:
    """Stock's result in float64."""
    wide = copy.deepcopy(model).double()
    wide.zero_grad()
    return run_stock(wide, batch, dtype=torch.float64, specs=specs_of(model))


@torch.no_grad()
def true_output(model: Any, batch: Batch) -> Tensor:
    """Stock's output in float64."""
    return stock_forward(copy.deepcopy(model).double(), batch.x, batch, specs_of(model))


def relative_error(got: Tensor, want: Tensor) -> float:
    got, want = got.detach().double(), want.detach().double()
    return float((got - want).norm() / want.norm().clamp(min=1e-30))


def assert_close(got: Result, want: Result, real: Tensor, *, output: float = 1e-6, gradient: float = 1e-5) -> None:
    """Real tokens' outputs, all gradients: none missing, none too many."""
    assert relative_error(got.y[real], want.y[real]) <= output
    assert relative_error(got.dx, want.dx) <= gradient
    assert got.grads.keys() == want.grads.keys()
    for name, grad in want.grads.items():
        assert relative_error(got.grads[name], grad) <= gradient, name


def scaled(result: Result, name: str, factor: float) -> Result:
    return replace(result, grads={**result.grads, name: result.grads[name] * factor})


def adapter_layers(model: Any) -> list[tuple[str, Any]]:
    return [(name, m) for name, m in decoder(model).layers.named_modules() if hasattr(m, "lora_A")]


def change(model: nn.Module, apply: Callable[[nn.Parameter], Tensor]) -> None:
    """Give every adapter parameter new memory, as `.half()` or TRL's cast does."""
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = apply(parameter)
