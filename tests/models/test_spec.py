from __future__ import annotations

from dataclasses import FrozenInstanceError, replace
from typing import Any

import pytest

from pyralis.errors import ModelError
from pyralis.models.spec import AttentionSpec, LayerSpec, NormSpec, Projection

ATTENTION = AttentionSpec(num_heads=4, num_kv_heads=2, head_dim=16, scale=0.25)
SPEC = LayerSpec(
    hidden_size=48,
    intermediate_size=96,
    attention=ATTENTION,
    rotary_dim=16,
    input_norm=NormSpec("input_layernorm", 1e-6),
    pre_mlp_norm=NormSpec("post_attention_layernorm", 1e-6),
    activation="silu",
    qkv=(
        Projection("self_attn.q_proj", 64, 48),
        Projection("self_attn.k_proj", 32, 48),
        Projection("self_attn.v_proj", 32, 48),
    ),
    attention_out=Projection("self_attn.o_proj", 48, 64),
    gate_up=(Projection("mlp.gate_proj", 96, 48), Projection("mlp.up_proj", 96, 48)),
    down=Projection("mlp.down_proj", 48, 96),
)


def test_parts_in_the_order_of_the_forward() -> None:
    norm = NormSpec("self_attn.q_norm", 1e-6)
    spec = replace(SPEC, q_norm=norm, k_norm=replace(norm, path="self_attn.k_norm"))
    assert [p.path for p in spec.projections] == [
        *(f"self_attn.{x}_proj" for x in "qkvo"), "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"
    ]  # fmt: skip
    assert [n.path for n in spec.norms] == [
        "input_layernorm", "self_attn.q_norm", "self_attn.k_norm", "post_attention_layernorm"
    ]  # fmt: skip
    assert (spec.query_features, spec.qkv_features) == (64, (64, 32, 32))


def test_fused_projections() -> None:
    spec = replace(
        SPEC, qkv=(Projection("self_attn.qkv_proj", 128, 48),), gate_up=(Projection("mlp.gate_up_proj", 192, 48),)
    )
    assert len(spec.projections) == 4


def test_specs_compare_and_hash_by_value() -> None:
    assert replace(SPEC) == SPEC
    assert len({SPEC, replace(SPEC), replace(SPEC, residual_multiplier=0.2)}) == 2
    with pytest.raises(FrozenInstanceError):
        SPEC.hidden_size = 64  # type: ignore[misc]


NORM = NormSpec("self_attn.q_norm", 1e-6)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"activation": "relu"}, "activation 'relu'"),
        ({"rotary_dim": 15}, "rotary_dim = 15"),
        ({"rotary_dim": 18}, "2..16"),
        ({"qkv": SPEC.qkv[:2]}, "48 -> 64 and 32 and 32 or 128 in one"),
        ({"down": replace(SPEC.down, in_features=90)}, "mlp.down_proj: 90 -> 48"),
        ({"attention_out": replace(SPEC.attention_out, out_features=64)}, "asks for 64 -> 48"),
        ({"gate_up": ()}, "the projections are none"),
        ({"q_norm": NORM}, "go together"),
        ({"q_norm": NORM, "k_norm": NormSpec("self_attn.k_norm", 1e-5)}, "alike"),
        ({"pre_mlp_norm": SPEC.input_norm}, "named twice"),
    ],
)
def test_contradictions_are_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ModelError, match=message.replace("(", r"\(")):
        replace(SPEC, **change)


@pytest.mark.parametrize("change", [{"kind": "batch"}, {"eps": -1.0}, {"kind": "layer", "unit_offset": True}])
def test_norms_that_do_not_exist(change: dict[str, Any]) -> None:
    with pytest.raises(ModelError, match=r"self_attn\.q_norm"):
        replace(NORM, **change)
