"""The architectures that can be made on the spot: the fields of their configs as published."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pyralis.errors import ConfigError
from pyralis.models.published import published_config

_LLAMA3_SCALING = {
    "rope_type": "llama3",
    "factor": 32.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


def _model(
    published: str, theta: float, positions: int, eps: float = 1e-6, rope: dict[str, Any] | None = None, **more: Any
) -> dict[str, Any]:
    """A published shape with what a model computes with besides."""
    shape = published_config(published)
    assert shape is not None, published
    rope = {"rope_type": "default", "rope_theta": theta} | (rope or {})
    return shape | {"rope_parameters": rope, "max_position_embeddings": positions, "rms_norm_eps": eps} | more


_SMALL: dict[str, Any] = {
    "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": 512,
}  # fmt: skip

MODELS: dict[str, dict[str, Any]] = {
    "llama3-8b": _model("llama-3-8b", 5e5, 8192, 1e-5),
    "qwen2-7b": _model("qwen2-7b", 1e6, 32768),
    "mistral-7b": _model("mistral-7b-v0.3", 1e6, 32768, 1e-5),
    "llama3.2-1b": _model("llama-3.2-1b", 5e5, 131072, 1e-5, _LLAMA3_SCALING),
    "qwen2-1.5b": _model("qwen2-1.5b", 1e6, 32768),
    "gemma2-2b": _model("gemma-2-2b", 1e4, 8192, query_pre_attn_scalar=256),
    "tinyllama": _model("tinyllama-1.1b", 1e4, 2048, 1e-5),
    "tiny": _model("tinyllama-1.1b", 1e4, 512, **_SMALL),  # for trying the benchmark itself
}


def model_folder(name: str) -> Path | None:
    """The folder that `name` is; None for one of `MODELS`. Raises ConfigError for neither."""
    if name in MODELS:
        return None
    folder = Path(name).expanduser().resolve()
    if not (folder / "config.json").is_file():
        raise ConfigError(f"--model {name!r} is neither one of {', '.join(MODELS)} nor a folder with a config.json")
    return folder
