"""The shapes of well-known models, from their published config.json: for predictions where the hub cannot be asked.

`published_config` goes by the last part of a name, since mirrors abound, and knows the sizes below. What has no say in
memory or time (RoPE's angles, token ids, norms' eps) is left at its default.
"""

from __future__ import annotations

import re
from typing import Any


def _decoder(
    model_type: str, hidden: int, intermediate: int, layers: int, heads: int, kv_heads: int, vocabulary: int,
    head_dim: int | None = None, *, tied: bool = False, **more: Any,
) -> dict[str, Any]:  # fmt: skip
    return {
        "model_type": model_type,
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "vocab_size": vocabulary,
        "tie_word_embeddings": tied,
        **({} if head_dim is None else {"head_dim": head_dim}),
        **more,
    }


_GEMMA2 = {"sliding_window": 4096, "attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0}
_PUBLISHED: tuple[tuple[str, dict[str, Any]], ...] = (
    (r"llama-?2-7b|vicuna-7b", _decoder("llama", 4096, 11008, 32, 32, 32, 32000)),
    (r"llama-?2-13b|vicuna-13b", _decoder("llama", 5120, 13824, 40, 40, 40, 32000)),
    (r"llama-?2-70b", _decoder("llama", 8192, 28672, 80, 64, 8, 32000)),
    (r"llama-3(\.1)?-8b", _decoder("llama", 4096, 14336, 32, 32, 8, 128256)),
    (r"llama-3(\.[13])?-70b", _decoder("llama", 8192, 28672, 80, 64, 8, 128256)),
    (r"llama-3\.2-1b", _decoder("llama", 2048, 8192, 16, 32, 8, 128256, 64, tied=True)),
    (r"llama-3\.2-3b", _decoder("llama", 3072, 8192, 28, 24, 8, 128256, 128, tied=True)),
    (r"tinyllama-1\.1b", _decoder("llama", 2048, 5632, 22, 32, 4, 32000)),
    (r"smollm2?-135m", _decoder("llama", 576, 1536, 30, 9, 3, 49152, tied=True)),
    (r"yi-1\.5-6b", _decoder("llama", 4096, 11008, 32, 32, 4, 64000)),
    (r"mistral-7b-(instruct-)?v0\.3", _decoder("mistral", 4096, 14336, 32, 32, 8, 32768, sliding_window=None)),
    (r"mistral-7b|zephyr-7b(?!-gemma)", _decoder("mistral", 4096, 14336, 32, 32, 8, 32000, sliding_window=4096)),
    (r"qwen1\.5-7b", _decoder("qwen2", 4096, 11008, 32, 32, 32, 151936)),
    (r"qwen2\.5-0\.5b|qwen2-0\.5b", _decoder("qwen2", 896, 4864, 24, 14, 2, 151936, tied=True)),
    (r"qwen2(\.5)?-1\.5b", _decoder("qwen2", 1536, 8960, 28, 12, 2, 151936, tied=True)),
    (r"qwen2(\.5)?-7b", _decoder("qwen2", 3584, 18944, 28, 28, 4, 152064)),
    (r"qwen2\.5-14b", _decoder("qwen2", 5120, 13824, 48, 40, 8, 152064)),
    (r"qwen2\.5-32b", _decoder("qwen2", 5120, 27648, 64, 40, 8, 152064)),
    (r"qwen2(\.5)?-72b", _decoder("qwen2", 8192, 29568, 80, 64, 8, 152064)),
    (r"qwen3-0\.6b", _decoder("qwen3", 1024, 3072, 28, 16, 8, 151936, 128, tied=True)),
    (r"qwen3-1\.7b", _decoder("qwen3", 2048, 6144, 28, 16, 8, 151936, 128, tied=True)),
    (r"qwen3-4b", _decoder("qwen3", 2560, 9728, 36, 32, 8, 151936, 128, tied=True)),
    (r"qwen3-8b", _decoder("qwen3", 4096, 12288, 36, 32, 8, 151936, 128)),
    (r"qwen3-14b", _decoder("qwen3", 5120, 17408, 40, 40, 8, 151936, 128)),
    (r"qwen3-32b", _decoder("qwen3", 5120, 25600, 64, 64, 8, 151936, 128)),
    (r"gemma-2b", _decoder("gemma", 2048, 16384, 18, 8, 1, 256000, 256, tied=True)),
    (r"gemma-7b", _decoder("gemma", 3072, 24576, 28, 16, 16, 256000, 256, tied=True)),
    (r"gemma-2-2b", _decoder("gemma2", 2304, 9216, 26, 8, 4, 256000, 256, tied=True, **_GEMMA2)),
    (r"gemma-2-9b", _decoder("gemma2", 3584, 14336, 42, 16, 8, 256000, 256, tied=True, **_GEMMA2)),
    (r"phi-3(\.5)?-mini", _decoder("phi3", 3072, 8192, 32, 32, 32, 32064)),
)


def published_config(name: str) -> dict[str, Any] | None:
    """The fields of a well-known model's config, for `AutoConfig.for_model`; None for any other name."""
    last = re.split(r"[/\\]", name.rstrip("/\\"))[-1].lower()
    last = re.sub(r"^(meta|unsloth|nous)-", "", last)
    return next((dict(fields) for pattern, fields in _PUBLISHED if re.match(pattern, last)), None)
