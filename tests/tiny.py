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
    "gemma2": {**_DECODER, "query_pre_attn_scalar": 16, "sliding_window": 32},
    "phi3": {key: value for key, value in _DECODER.items() if key != "head_dim"},
    "gpt2": {"n_embd": 64, "n_inner": 128, "n_layer": 2, "n_head": 4, "n_positions": 512},
    "bloom": {"hidden_size": 64, "n_layer": 2, "n_head": 4},
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


_SPECIAL_IDS = {"pad_token_id": "<|pad|>", "bos_token_id": "<|endoftext|>", "eos_token_id": "<|im_end|>"}
