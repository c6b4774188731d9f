"""A GGUF file (llama.cpp's format) read into an ordinary model, and converted to a standard folder."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from pyralis.errors import ModelError


def gguf_options() -> dict[str, Any]:
    """What `from_pretrained(gguf_file=...)` must be given besides, for weights that can be trained and saved.

    Newer transformers keep the weights packed unless told otherwise; older ones have no such class and unpack.
    """
    if importlib.util.find_spec("gguf") is None:
        raise ModelError("Reading a GGUF file needs the package gguf: `pip install 'pyralis[gguf]'`.")
    config = getattr(transformers, "GgufConfig", None)
    return {} if config is None else {"quantization_config": config(dequantize=True)}


def convert_gguf(gguf: Path, out: Path) -> None:
    """Write `gguf` as a folder of safetensors in bfloat16, with its tokenizer and chat template.

    bfloat16 rounds the dequantised weights by 0.13 % RMS, which is small against what Q4_1 itself has lost (about
    3 %), and is what hubs keep. For SmolLM2-135M the most likely next token stays the same throughout.
    """
    location = {"pretrained_model_name_or_path": str(gguf.parent), "gguf_file": gguf.name}
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(**location, **gguf_options(), dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(**location)
    if tokenizer.model_max_length > 10**9:  # GGUF says nothing: transformers puts its "unlimited"
        tokenizer.model_max_length = model.config.max_position_embeddings
    model.bfloat16().save_pretrained(out)
    tokenizer.save_pretrained(out)
