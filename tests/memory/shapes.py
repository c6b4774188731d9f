"""Shapes of models that are made on no device, for predictions."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM

from pyralis.bench.train.architectures import MODELS
from pyralis.memory.shape import Assumed, ModelShape, describe_model
from pyralis.models.surgery import decoder_layers
from pyralis.ops._triton import Gpu

LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


@cache
def shape_of(
    name: str, *, rank: int = 16, four_bit: bool = True, layers: int | None = None, dropout: float = 0.0
) -> ModelShape:
    """One of `MODELS` with LoRA on all projections, in bfloat16."""
    fields: dict[str, Any] = dict(MODELS[name])
    fields["num_hidden_layers"] = layers or fields["num_hidden_layers"]
    with torch.device("meta"):
        config = AutoConfig.for_model(**fields)
        if getattr(config, "attn_logit_softcapping", None):  # transformers before 5.23 would take SDPA, without it
            config._attn_implementation = "eager"
        model = AutoModelForCausalLM.from_config(config)
        tuned = get_peft_model(model, LoraConfig(r=rank, lora_dropout=dropout, target_modules=LINEAR))
    return describe_model(model, decoder_layers(tuned), Gpu((9, 0), 132), assumed=Assumed(four_bit))
