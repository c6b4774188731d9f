"""RoPE for longer sequences: which scaling, seen in the config and in the angles a model computes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoConfig

from pyralis.errors import ModelError
from pyralis.models.rope_scaling import context_length, extend_context, set_rope_scaling
from tests.tiny import build_tiny_variant

LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}


def config(family: str, **fields: Any) -> Any:
    return AutoConfig.for_model(family, num_hidden_layers=2, **fields)


def angles(of: Any, positions: Tensor) -> Tensor:
    """Of a model's first frequencies at these positions, [len, dim]."""
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    cos, sin = LlamaRotaryEmbedding(of)(torch.zeros(1), positions[None])
    return torch.cat([cos[0], sin[0]], -1)


def test_a_model_that_reaches_far_enough_stays_as_it_is() -> None:
    llama = config("llama", max_position_embeddings=2048)
    before = llama.to_dict()
    assert extend_context(llama, 2048) is None
    assert llama.to_dict() == before


def test_default_becomes_linear_by_the_ratio() -> None:
    llama, stock = (config("llama", max_position_embeddings=2048, rope_theta=5e5) for _ in range(2))
    note = extend_context(llama, 8192)
    assert note == "RoPE is scaled (linear x 4) for 8192 tokens; the model was made for 2048"
    assert llama.rope_parameters == {"rope_theta": 5e5, "rope_type": "linear", "factor": 4.0}
    assert context_length(llama) == llama.max_position_embeddings == 8192
    positions = torch.arange(0, 8192, 16)
    torch.testing.assert_close(angles(llama, positions), angles(stock, positions // 4), rtol=0, atol=2e-4)


def test_a_scaled_config_survives_saving(tmp_path: Any) -> None:
    llama = config("llama", max_position_embeddings=2048)
    extend_context(llama, 3000)
    llama.save_pretrained(tmp_path)
    loaded = AutoConfig.from_pretrained(tmp_path)
    assert loaded.rope_parameters == llama.rope_parameters
    assert extend_context(loaded, 3000) is None


@pytest.mark.parametrize(
    ("fields", "wanted", "expected"),
    [
        ({"max_position_embeddings": 8192, "rope_scaling": {"rope_type": "linear", "factor": 2.0}}, 16384, 4.0),
        (
            {
                "max_position_embeddings": 131072,
                "rope_scaling": {**LLAMA3, "original_max_position_embeddings": 8192},
            },
            262144,
            16.0,
        ),
        (  # as Qwen2.5 says it: 4 x 32768 without a word in max_position_embeddings
            {
                "max_position_embeddings": 32768,
                "rope_scaling": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768},
            },
            262144,
            8.0,
        ),
    ],
)
def test_scaled_models_are_scaled_further(fields: dict[str, Any], wanted: int, expected: float) -> None:
    llama = config("llama", **fields)
    assert extend_context(llama, wanted) is not None
    assert llama.rope_parameters["factor"] == expected
    kind = fields["rope_scaling"]["rope_type"]
    assert (llama.rope_parameters["rope_type"], llama.max_position_embeddings) == (kind, wanted)
    llama.validate_rope()
    if kind == "llama3":
        assert llama.rope_parameters["original_max_position_embeddings"] == 8192


def test_lengths_that_the_own_scaling_already_reaches() -> None:
    yarn = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}
    qwen = config("qwen2", max_position_embeddings=32768, rope_scaling=yarn)
    assert context_length(qwen) == 131072
    assert extend_context(qwen, 131072) is None
    vicuna = config(
        "llama",
        max_position_embeddings=4096,
        max_sequence_length=16384,
        rope_scaling={"rope_type": "linear", "factor": 4.0},
    )
    assert extend_context(vicuna, 16384) is None
    assert vicuna.rope_parameters["factor"] == 4.0


@pytest.mark.parametrize("kind", ["dynamic", "longrope"])
def test_kinds_that_are_left_alone(kind: str) -> None:
    scaling: dict[str, Any] = {"rope_type": kind}
    scaling |= {"factor": 2.0} if kind == "dynamic" else {"short_factor": [1.0] * 48, "long_factor": [4.0] * 48}
    model = config(
        "llama" if kind == "dynamic" else "phi3",
        max_position_embeddings=4096,
        original_max_position_embeddings=1024,
        rope_scaling=scaling,
    )
    before = model.to_dict()
    note = extend_context(model, 8192)
    assert note is not None
    assert ("scales dynamically" if kind == "dynamic" else "stays as it is (longrope)") in note
    assert model.to_dict() == before


def test_windows() -> None:
    mistral = config("mistral", max_position_embeddings=32768, sliding_window=4096)
    assert (
        extend_context(mistral, 65536) == "RoPE needs no scaling for 65536 tokens: every layer attends within a window"
    )
    assert (mistral.rope_parameters["rope_type"], mistral.max_position_embeddings) == ("default", 65536)
    full = config("mistral", max_position_embeddings=32768, sliding_window=None)
    extend_context(full, 65536)
    assert full.rope_parameters["factor"] == 2.0
    gemma = config("gemma3_text", max_position_embeddings=8192, sliding_window=512)
    extend_context(gemma, 16384)
    assert gemma.rope_parameters["full_attention"]["factor"] == 2.0
    assert gemma.rope_parameters["sliding_attention"]["rope_type"] == "default"
    qwen = config(
        "qwen2", max_position_embeddings=4096, sliding_window=1024, use_sliding_window=True, max_window_layers=1
    )
    extend_context(qwen, 8192)  # one layer of two has no window
    assert qwen.rope_parameters["factor"] == 2.0


def test_learnt_positions() -> None:
    gpt2 = config("gpt2", n_positions=1024)
    assert extend_context(gpt2, 2048) == (
        "the model has 1024 positions and no rotary ones: sequences of 2048 tokens do not fit"
    )
    assert gpt2.n_positions == 1024
    with pytest.raises(ModelError, match="has no rotary positions"):
        set_rope_scaling(gpt2, 2.0)


def test_a_scaling_that_is_given() -> None:
    llama = config("llama", max_position_embeddings=2048, rope_theta=5e5)
    assert set_rope_scaling(llama, 2.5, 4096) == "RoPE is scaled as given: linear x 2.5"
    assert llama.rope_parameters == {"rope_theta": 5e5, "rope_type": "linear", "factor": 2.5}
    assert llama.max_position_embeddings == 4096
    set_rope_scaling(llama, {"type": "dynamic", "factor": 3.0}, 16384)
    assert (llama.rope_parameters["rope_type"], llama.max_position_embeddings) == ("dynamic", 4096)
    for wrong in (-1.0, {"type": "yarn", "factor": "much"}, {"type": "cubic", "factor": 2.0}):
        with pytest.raises(ModelError, match="expected a positive factor"):
            set_rope_scaling(llama, wrong)
    with pytest.raises(ModelError, match="which transformers refuses"):
        set_rope_scaling(llama, {"type": "llama3", "factor": 2.0})


@pytest.mark.parametrize("name", ["llama", "gemma3_text", "qwen2", "phi3", "llama-llama3-rope", "llama-yarn-rope"])
def test_models_compute_with_it(name: str) -> None:
    """A model made of the scaled config sees position `ratio * t` (almost) as the stock one sees t."""
    stock = build_tiny_variant(name)
    scaled = type(stock.config).from_dict(stock.config.to_dict())
    limit = context_length(scaled)
    assert limit is not None
    assert extend_context(scaled, 4 * limit) is not None
    torch.manual_seed(0)
    model = type(stock)(scaled).eval()
    model.load_state_dict(stock.state_dict())
    ids = torch.arange(4, 68)[None]
    assert not torch.allclose(model(ids).logits, stock(ids).logits, atol=1e-4)
    assert model(ids, position_ids=torch.arange(64)[None] * 4).logits.isfinite().all()
    if "-" not in name and name != "gemma3_text":
        found = model(ids, position_ids=torch.arange(64)[None] * 4).logits
        torch.testing.assert_close(found, stock(ids).logits, rtol=1e-4, atol=1e-4)
