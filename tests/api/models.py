"""Tiny models loaded through the API."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pyralis import FastLanguageModel
from tests.tiny import make_tiny_model

IDS = torch.arange(4, 52).view(2, 24)


def load(folder: Path, family: str = "llama", **arguments: Any) -> tuple[Any, Any]:
    """A model in float32, RoPE as it is."""
    if not any((folder / name).is_file() for name in ("config.json", "adapter_config.json")):
        make_tiny_model(folder, family)
    return FastLanguageModel.from_pretrained(str(folder), **{"dtype": "float32", "max_seq_length": None, **arguments})


def with_adapter(folder: Path, family: str = "llama", bits: int | None = 4, **arguments: Any) -> Any:
    """A model with an adapter that does something."""
    model, _ = load(folder, family, load_in_4bit=bits == 4)
    model = FastLanguageModel.get_peft_model(model, **{"r": 4, "use_gradient_checkpointing": False, **arguments})
    change(model)
    return model


def change(model: Any) -> None:
    """As a training step would, every trained weight."""
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.1)


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        return model.eval()(IDS, use_cache=False).logits.float()
