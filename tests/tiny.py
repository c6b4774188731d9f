"""Tiny random models and a tiny tokenizer, made on the spot: `make_tiny_model(folder, family="llama")`.

A model has 2 layers of 64 units (a multiple of the NF4 block of 64) and saves as a standard folder in milliseconds.
Norm weights and biases are random too: with ones and zeros a wrong norm or a lost bias would go unseen.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

SPECIAL_TOKENS = ("<|pad|>", "<|endoftext|>", "<|im_start|>", "<|im_end|>")
VOCAB_SIZE = 320  # 256 bytes + 4 special tokens, and rows to spare as real checkpoints have

CHATML_JINJA = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)

_DECODER = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 512,
}
# What each family's config calls things, and what differs from _DECODER.
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": _DECODER,
    "mistral": _DECODER,
    "qwen2": {key: value for key, value in _DECODER.items() if key != "head_dim"},
    "qwen3": _DECODER,
    "gemma": _DECODER,
    # transformers before 5.23 would take SDPA, which leaves the softcap out
    "gemma2": {**_DECODER, "query_pre_attn_scalar": 16, "sliding_window": 32, "attn_implementation": "eager"},
    "gemma3_text": {
        **_DECODER,
        "query_pre_attn_scalar": 24,
        "sliding_window": 32,
        "layer_types": ["sliding_attention", "full_attention"],
    },
    "phi3": {key: value for key, value in _DECODER.items() if key != "head_dim"},
    "granite": {
        **{key: value for key, value in _DECODER.items() if key != "head_dim"},
        "attention_multiplier": 0.2,
        "residual_multiplier": 0.7,
        "embedding_multiplier": 3.0,
        "logits_scaling": 2.0,
    },
    "gpt2": {"n_embd": 64, "n_inner": 128, "n_layer": 2, "n_head": 4, "n_positions": 512},
    "bloom": {"hidden_size": 64, "n_layer": 2, "n_head": 4},
}

_WINDOWS = {"sliding_window": 8, "use_sliding_window": True}
# What the checkpoints of one family differ in: name -> (family, fields of the config). `build_tiny_variant` makes them.
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama-linear-rope": ("llama", {"rope_scaling": {"rope_type": "linear", "factor": 2.0}}),
    "llama-dynamic-rope": (
        "llama",
        {"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}, "max_position_embeddings": 16},
    ),
    "llama-llama3-rope": (
        "llama",
        {
            "rope_scaling": {
                "rope_type": "llama3",
                "factor": 4.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 64,
            }
        },
    ),
    "llama-yarn-rope": (
        "llama",
        {"rope_scaling": {"rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 64}},
    ),
    "llama-biases": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "llama-gelu": ("llama", {"hidden_act": "gelu"}),
    "llama-all-heads": ("llama", {"num_key_value_heads": 4}),
    "llama-wide-heads": ("llama", {"head_dim": 32}),
    "mistral-window": ("mistral", {"sliding_window": 8}),
    "mistral-full": ("mistral", {"sliding_window": None}),
    "qwen2-windows": ("qwen2", {**_WINDOWS, "max_window_layers": 1}),
    "qwen3-windows": ("qwen3", {**_WINDOWS, "max_window_layers": 1, "attention_bias": True}),
    "gemma2-window": ("gemma2", {"sliding_window": 8, "attn_logit_softcapping": 5.0}),
    "phi3-partial-rotary": ("phi3", {"partial_rotary_factor": 0.5}),
    "phi3-longrope": (
        "phi3",
        {
            "rope_scaling": {"rope_type": "longrope", "short_factor": [1.5], "long_factor": [3.0]},  # as long as needed
            "original_max_position_embeddings": 16,
        },
    ),
    "phi3-window": ("phi3", {"sliding_window": 8}),
}


def make_tiny_tokenizer(
    *, chat_template: str | None = CHATML_JINJA, pad_token: str | None = "<|pad|>"
) -> PreTrainedTokenizerFast:
    """A byte-level tokenizer without merges: every text is its UTF-8 bytes, special tokens are one id each."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: index for index, token in enumerate((*SPECIAL_TOKENS, *alphabet))}
    core = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    core.add_special_tokens(list(SPECIAL_TOKENS))
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, eos_token="<|im_end|>", pad_token=pad_token, clean_up_tokenization_spaces=False
    )
    tokenizer.chat_template = chat_template
    return tokenizer


def make_tiny_model(
    folder: Path,
    family: str = "llama",
    *,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    tokenizer: PreTrainedTokenizerFast | None = None,
    **config: Any,
) -> Path:
    """Save a random model of `family` with a tokenizer to `folder`; `config` overrides fields of the model's config."""
    folder = Path(folder)
    model = build_tiny_model(family, seed=seed, **config)
    model.to(dtype).save_pretrained(folder)
    (tokenizer or make_tiny_tokenizer()).save_pretrained(folder)
    return folder


def build_tiny_model(family: str = "llama", *, seed: int = 0, **config: Any) -> PreTrainedModel:
    """The model alone, in float32 and eval mode."""
    ids = {name: SPECIAL_TOKENS.index(token) for name, token in _SPECIAL_IDS.items()}
    fields = {"vocab_size": VOCAB_SIZE, **ids, "initializer_range": 0.1, **FAMILIES[family], **config}
    if (scaling := fields.get("rope_scaling") or {}).get("rope_type") == "longrope":
        fields["rope_scaling"] = _lengthened(scaling, fields["hidden_size"] // fields["num_attention_heads"] // 2)
    state = torch.random.get_rng_state()
    try:
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **fields))
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.dim() == 1:
                    parameter.add_(torch.randn_like(parameter) * 0.1)
    finally:
        torch.random.set_rng_state(state)
    return model.eval()


def _lengthened(scaling: dict[str, Any], frequencies: int) -> dict[str, Any]:
    """longrope has a factor for each frequency: one for all of them, repeated."""
    return scaling | {name: scaling[name] * frequencies for name in ("short_factor", "long_factor")}


def build_tiny_variant(name: str, *, seed: int = 0, **config: Any) -> PreTrainedModel:
    """A model of a family or of one of its VARIANTS."""
    family, fields = VARIANTS.get(name, (name, {}))
    return build_tiny_model(family, seed=seed, **fields | config)


_SPECIAL_IDS = {"pad_token_id": "<|pad|>", "bos_token_id": "<|endoftext|>", "eos_token_id": "<|im_end|>"}
