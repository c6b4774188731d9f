"""The architectures that can be made on the spot: the fields of their configs as published."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pyralis.errors import ConfigError

_LLAMA3_SCALING = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 32.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


def _decoder(
    model_type: str, hidden: int, intermediate: int, layers: int, heads: int, kv_heads: int, vocabulary: int,
    theta: float, positions: int, **more: Any,
) -> dict[str, Any]:  # fmt: skip
    return {
        "model_type": model_type,
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "vocab_size": vocabulary,
        "rope_parameters": {"rope_type": "default", "rope_theta": theta},
        "max_position_embeddings": positions,
        "rms_norm_eps": 1e-6,
        **more,
    }


MODELS: dict[str, dict[str, Any]] = {
    "llama3-8b": _decoder("llama", 4096, 14336, 32, 32, 8, 128256, 5e5, 8192, rms_norm_eps=1e-5),
    "qwen2-7b": _decoder("qwen2", 3584, 18944, 28, 28, 4, 152064, 1e6, 32768),
    "mistral-7b": _decoder(
        "mistral", 4096, 14336, 32, 32, 8, 32768, 1e6, 32768, rms_norm_eps=1e-5, sliding_window=None
    ),
    "llama3.2-1b": _decoder(
        "llama", 2048, 8192, 16, 32, 8, 128256, 5e5, 131072,
        rms_norm_eps=1e-5, head_dim=64, tie_word_embeddings=True, rope_parameters=_LLAMA3_SCALING,
    ),
    "qwen2-1.5b": _decoder("qwen2", 1536, 8960, 28, 12, 2, 151936, 1e6, 32768, tie_word_embeddings=True),
    "gemma2-2b": _decoder(
        "gemma2", 2304, 9216, 26, 8, 4, 256000, 1e4, 8192,
        head_dim=256, query_pre_attn_scalar=256, sliding_window=4096, attn_logit_softcapping=50.0,
        final_logit_softcapping=30.0,
    ),
    "tinyllama": _decoder("llama", 2048, 5632, 22, 32, 4, 32000, 1e4, 2048, rms_norm_eps=1e-5),
    "tiny": _decoder("llama", 128, 256, 2, 4, 2, 512, 1e4, 512),  # for trying the benchmark itself
}  # fmt: skip


def model_folder(name: str) -> Path | None:
    """The folder that `name` is; None for one of `MODELS`. Raises ConfigError for neither."""
    if name in MODELS:
        return None
    folder = Path(name).expanduser().resolve()
    if not (folder / "config.json").is_file():
        raise ConfigError(f"--model {name!r} is neither one of {', '.join(MODELS)} nor a folder with a config.json")
    return folder
