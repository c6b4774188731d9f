"""Starts of LoRA that are taken out of the base weights (PiSSA, OLoRA, CorDA, LoftQ), and adapters saved after them.

Such a start leaves W - s B0 A0 as the base, so that the adapter fits no other base than this one. Saved as

    s (B A - B0 A0) = s [B | -B0] [A; A0]

of twice the rank it fits the base model that it names, like any LoRA. LoftQ's base is rounded as well, which nothing in
the adapter could undo: it fits only a model that is merged here.
"""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, get_peft_model_state_dict
from safetensors.torch import load_file, save_file
from torch import Tensor

from pyralis.models.files import read_json
from pyralis.models.staging import write_text

_CHANGING = ("pissa", "olora", "corda", "loftq")
_START = "_pyralis_lora_start"


def changes_base(init_lora_weights: bool | str) -> bool:
    return isinstance(init_lora_weights, str) and init_lora_weights.startswith(_CHANGING)


def keep_start(model: PeftModel) -> None:
    """Remember A0 and B0 of a model that was just given such a start, on the CPU."""
    state = get_peft_model_state_dict(model, save_embedding_layers=False)
    vars(model)[_START] = {
        name: value.detach().cpu().clone() for name, value in state.items() if name.endswith(_FACTORS)
    }


def refer_to_original_base(model: PeftModel, adapter: Path) -> None:
    """Rewrite the adapter that `model` has just been saved as, so that it fits the base as it was before the start."""
    start: dict[str, Tensor] = vars(model).get(_START, {})
    config_file, weights_file = adapter / "adapter_config.json", adapter / "adapter_model.safetensors"
    if not start or not weights_file.is_file():
        return
    config = read_json(config_file)
    if str(config["init_lora_weights"]).startswith("loftq"):
        return
    weights = load_file(weights_file)
    for name, first in start.items():
        rows = name.endswith(_FACTORS[0])
        weights[name] = torch.cat([weights[name], first if rows else -first], 0 if rows else 1).contiguous()
    staged = weights_file.with_name(f".{weights_file.name}.tmp")
    save_file(weights, staged, metadata={"format": "pt"})
    write_text(config_file, json.dumps(_of_twice_the_rank(config), indent=2, sort_keys=True) + "\n")
    os.replace(staged, weights_file)


_FACTORS = (".lora_A.weight", ".lora_B.weight")


def _of_twice_the_rank(config: dict[str, Any]) -> dict[str, Any]:
    growth = math.sqrt(2) if config.get("use_rslora") else 2  # of alpha, for the same scale
    return config | {
        "r": 2 * config["r"],
        "lora_alpha": growth * config["lora_alpha"],
        "rank_pattern": {name: 2 * rank for name, rank in (config.get("rank_pattern") or {}).items()},
        "alpha_pattern": {name: growth * alpha for name, alpha in (config.get("alpha_pattern") or {}).items()},
        "init_lora_weights": True,
    }
