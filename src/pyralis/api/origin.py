"""How a model was loaded, kept with it: what attaching, saving and switching modes have to know later."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias

import torch
from peft import PeftModel
from torch import nn
from transformers import PreTrainedTokenizerBase

from pyralis.errors import ModelError
from pyralis.lora.record import TrainingRecord
from pyralis.models.load import TrainMode
from pyralis.models.nf4 import four_bit_layers

Checkpointing: TypeAlias = bool | Literal["unsloth", "auto"]

_ORIGIN = "_pyralis_origin"


@dataclass(frozen=True, slots=True)
class Origin:
    """Attributes:
    mode: "full" where all weights are trained.
    record: what is written beside an adapter.
    max_seq_length: the longest sequence that the model was loaded for.
    checkpointing: what recomputation was asked for last.
    name: what an adapter calls its base model; None leaves it to PEFT.
    tokenizer: loaded with the model; its padding side changes with the mode.
    offload_embedding: keep the embedding in host memory once an adapter has frozen it.
    """

    mode: TrainMode = "lora"
    record: TrainingRecord = field(default_factory=TrainingRecord)
    max_seq_length: int | None = None
    checkpointing: Checkpointing = "auto"
    name: str | None = None
    tokenizer: PreTrainedTokenizerBase | None = None
    offload_embedding: bool = False


def base_of(model: Any) -> Any:
    """The causal LM inside PEFT's wrapper. Raises ModelError for what is no model."""
    if not isinstance(model, nn.Module):
        raise ModelError(f"expected a model, such as FastLanguageModel.from_pretrained returns, not {model!r}.")
    return model.get_base_model() if isinstance(model, PeftModel) else model


def origin_of(model: nn.Module) -> Origin:
    """What is known of a model; of one that was loaded by other means what it shows."""
    known = vars(base_of(model)).get(_ORIGIN)
    return known if known is not None else Origin(record=_record(base_of(model)))


def set_origin(model: nn.Module, origin: Origin) -> None:
    """Kept with the causal LM itself, so that it survives wrapping, copying and pickling."""
    vars(base_of(model))[_ORIGIN] = origin


def _record(base: Any) -> TrainingRecord:
    half = base.dtype if base.dtype in (torch.bfloat16, torch.float16) else None
    first = next(four_bit_layers(base), None)
    if first is None:
        return TrainingRecord(dtype=half, model_type=base.config.model_type)
    weight = first[1].weight
    nested = bool(getattr(weight.quant_state, "nested", True))
    return TrainingRecord(True, weight.quant_type, nested, half, model_type=base.config.model_type)
