"""From a decoder layer and its config to a `LayerSpec`, or to the reason in plain words why there is none.

Nothing is believed by its name. The layer's class has to be transformers' own, with its own `forward`; so do those of
attention, MLP and norms; the modules inside have to be exactly the expected ones, of the expected shapes; and what the
stock `forward` reads (scale, window, dropout, causality) is read where it reads it.

`detect_layer` looks at what a layer is. What may change from call to call (hooks, adapters, gradients wanted for frozen
parts) is `layer_state.py`'s.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn

from pyralis.errors import ModelError
from pyralis.models.families import FAMILIES, OTHERS, Family
from pyralis.models.modules import (
    Unlike,
    activation_of,
    expect_class,
    expect_members,
    expect_norm,
    expect_number,
    expect_projection,
)
from pyralis.models.spec import AttentionSpec, LayerSpec, NormSpec, Projection
from pyralis.models.swap import stock_class

# Attention functions of transformers that all compute the same; a registered one may compute anything.
ATTENTIONS = ("eager", "sdpa", "flash_attention_2", "flash_attention_3", "flash_attention_4", "flex_attention")


@dataclass(frozen=True)
class Reason:
    """Why something runs stock: a phrase for "stock: ...", such as "a mixture of experts"."""

    text: str

    def __str__(self) -> str:
        return self.text


def detect_layer(layer: nn.Module, config: Any) -> LayerSpec | Reason:
    """What `layer` computes, if the fused block computes exactly that.

    Args:
        layer: of the decoder's list of layers; PEFT may have wrapped linear layers in it.
        config: the decoder's own config (of a multimodal model: its text config).
    """
    stock = stock_class(type(layer))
    for family in FAMILIES:
        if stock.__module__ == family.source and stock.__name__ == f"{family.prefix}DecoderLayer":
            try:
                return _read(layer, stock, config, family)
            except (Unlike, ModelError) as error:
                return Reason(str(error))
    return Reason(_unknown(layer, stock))


def family_of(layer: nn.Module) -> Family | None:
    """The family whose decoder layer this is, by its class; whether it is served says `detect_layer`."""
    stock = stock_class(type(layer))
    known = (f for f in FAMILIES if (stock.__module__, stock.__name__) == (f.source, f"{f.prefix}DecoderLayer"))
    return next(known, None)


def _read(layer: Any, stock: type, config: Any, family: Family) -> LayerSpec:
    expect_class(layer, family.source, stock.__name__, "the layer")
    norm_names = ["input_layernorm", "post_attention_layernorm"]
    if family.four_norms:
        norm_names += ["pre_feedforward_layernorm", "post_feedforward_layernorm"]
    expect_members(layer, ("self_attn", "mlp", *norm_names, *family.dropouts), "the layer")
    attn: Any = expect_class(layer.self_attn, family.source, f"{family.prefix}Attention", "self_attn")
    mlp: Any = expect_class(layer.mlp, family.source, f"{family.prefix}MLP", "mlp")
    qk_names = ("q_norm", "k_norm") if family.qk_norm else ()
    qkv_names = ("qkv_proj",) if family.fused else ("q_proj", "k_proj", "v_proj")
    gate_names = ("gate_up_proj",) if family.fused else ("gate_proj", "up_proj")
    expect_members(attn, (*qkv_names, "o_proj", *qk_names), "self_attn")
    expect_members(mlp, (*gate_names, "down_proj", family.activation_name), "mlp")
    for name in family.dropouts:
        dropout: Any = expect_class(getattr(layer, name), "torch.nn.modules.dropout", "Dropout", name)
        if dropout.p:
            raise Unlike(f"dropout of {dropout.p} on the residual stream")

    attention = _attention(attn, config, family)
    norms = [_norm(layer, name, config.hidden_size, family) for name in norm_names]
    qk_norms = [_norm(layer, f"self_attn.{name}", attention.head_dim, family) for name in qk_names]
    return LayerSpec(
        hidden_size=config.hidden_size,
        intermediate_size=config.intermediate_size,
        attention=attention,
        rotary_dim=_rotary_dim(attention.head_dim, config, family),
        input_norm=norms[0],
        pre_mlp_norm=norms[2] if family.four_norms else norms[1],
        activation=activation_of(getattr(mlp, family.activation_name)),
        qkv=tuple(_projection(layer, f"self_attn.{name}") for name in qkv_names),
        attention_out=_projection(layer, "self_attn.o_proj"),
        gate_up=tuple(_projection(layer, f"mlp.{name}") for name in gate_names),
        down=_projection(layer, "mlp.down_proj"),
        q_norm=qk_norms[0] if qk_norms else None,
        k_norm=qk_norms[1] if qk_norms else None,
        post_attention_norm=norms[1] if family.four_norms else None,
        post_mlp_norm=norms[3] if family.four_norms else None,
        residual_multiplier=expect_number(layer, "residual_multiplier") if family.residual_multiplier else 1.0,
    )


def _attention(attn: Any, config: Any, family: Family) -> AttentionSpec:
    implementation = getattr(config, "_attn_implementation", None) or "eager"
    if implementation not in ATTENTIONS:
        raise Unlike(f"attention by {implementation!r}, which is not transformers' own")
    if not attn.is_causal or not getattr(config, "is_causal", True):
        raise Unlike("attention in both directions")
    if attn.attention_dropout:
        raise Unlike(f"attention dropout of {attn.attention_dropout}")
    softcap = getattr(attn, "attn_logit_softcapping", None)
    if softcap is not None and not family.softcap:
        raise Unlike(f"attn_logit_softcapping = {softcap}, which {family.name}'s layers do not look at")
    if softcap is not None and implementation == "sdpa":
        raise Unlike("SDPA, which leaves the softcap out; load with attn_implementation='eager'")
    return AttentionSpec(
        config.num_attention_heads, config.num_key_value_heads, attn.head_dim, expect_number(attn, "scaling"),
        window=_window(attn, config, family), softcap=softcap,
    )  # fmt: skip


def _window(attn: Any, config: Any, family: Family) -> int | None:
    if family.windows == "none":
        return None
    if family.windows == "config":
        return config.sliding_window
    # The backbone chooses the mask by the config, the attention function by the module: they have to agree.
    kind = config.layer_types[attn.layer_idx]
    window = {"full_attention": None, "sliding_attention": config.sliding_window}.get(kind, ...)
    if window is ... or (attn.layer_type, attn.sliding_window) != (kind, window):
        raise Unlike(f"layer_types says {kind!r} and the layer {attn.layer_type!r}, window {attn.sliding_window}")
    if kind == "sliding_attention" and window is None:
        raise Unlike("sliding attention without a window")
    return window


def _rotary_dim(head_dim: int, config: Any, family: Family) -> int:
    if not family.partial_rotary:
        return head_dim
    parameters = getattr(config, "rope_parameters", None) or {}
    return int(head_dim * parameters.get("partial_rotary_factor", getattr(config, "partial_rotary_factor", 1.0)))


def _norm(layer: nn.Module, path: str, size: int, family: Family) -> NormSpec:
    module = layer.get_submodule(path)
    expect_class(module, family.source, f"{family.prefix}RMSNorm", path)
    eps = expect_norm(module, "eps" if family.unit_offset else "variance_epsilon", size, path)
    return NormSpec(path, eps, unit_offset=family.unit_offset)


def _projection(layer: nn.Module, path: str) -> Projection:
    shape = expect_projection(layer.get_submodule(path), path)
    return Projection(path, shape.out_features, shape.in_features, shape.bias)


def _unknown(layer: nn.Module, stock: type) -> str:
    names = {name for name, _ in layer.named_modules()}
    if any(name.rpartition(".")[2] in ("experts", "router", "block_sparse_moe") for name in names):
        return f"a mixture of experts ({stock.__name__})"
    if stock.__module__.startswith("transformers.models."):
        for prefix, reason in OTHERS.items():
            if stock.__name__.startswith(prefix):
                return f"{reason} ({stock.__name__})"
    if stock.__module__.startswith("transformers_modules."):
        return f"code that came with the checkpoint ({stock.__name__})"
    return f"there is no fast block for {stock.__name__} yet"
