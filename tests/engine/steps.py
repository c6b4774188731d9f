"""Steps of a tiny model with an adapter: run, recorded (on a CPU by `tape.py`, on a GPU as CUDA graphs), compared."""

from __future__ import annotations

from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

from pyralis.engine.recorders import CudaGraphs
from pyralis.engine.step_graphs import StepGraphs, use_step_graphs
from pyralis.models.causal_lm import causal_lm_loss
from pyralis.models.surgery import accelerate
from tests.engine.tape import TapeRecorder
from tests.tiny import FAMILIES, build_tiny_model

ALL_ROWS = 1 << 20  # more than there are: none is left out
# Heads of 64, which every attention backend of a GPU takes.
SIZES = {
    "hidden_size": 128,
    "intermediate_size": 192,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "vocab_size": 300,
}


def make(
    device: torch.device, family: str = "llama", dropout: float = 0.0, dtype: torch.dtype | None = None, **lora: Any
) -> Any:
    sizes = SIZES if "head_dim" not in FAMILIES[family] else {**SIZES, "head_dim": 64}
    model = build_tiny_model(family, **sizes)
    torch.manual_seed(3)
    settings = {"r": 4, "lora_dropout": dropout, "init_lora_weights": False, "target_modules": "all-linear", **lora}
    tuned: Any = get_peft_model(model, LoraConfig(**settings))
    dtype = dtype or (torch.float32 if device.type == "cpu" else torch.bfloat16)
    tuned.get_base_model().to(dtype=dtype)
    for name, parameter in tuned.named_parameters():
        if "lora_" in name:
            parameter.data = parameter.data.float()
    tuned.to(device)
    accelerate(tuned)
    return tuned.train()


def graphs(model: nn.Module, device: torch.device) -> StepGraphs:
    made = use_step_graphs(model, recorder=CudaGraphs(device) if device.type == "cuda" else TapeRecorder())
    assert made is not None
    return made


def batch(device: torch.device, tokens: int = 50, kind: str = "right", seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(4, 290, (1 if kind == "packed" else 2, tokens), generator=generator)
    labels = ids.clone()
    labels[:, :7] = -100
    inputs = {"input_ids": ids, "labels": labels}
    mask = torch.ones_like(ids)
    if kind == "packed":
        first = 11 + seed
        inputs["position_ids"] = torch.cat([torch.arange(first), torch.arange(tokens - first)])[None]
        labels[:, first] = -100
    elif kind == "right":
        mask[1, 33 + seed :] = 0
    else:
        mask[1, : 9 + seed] = 0
        labels[1, 9 + seed] = -100
    if kind != "packed":
        labels[mask == 0] = -100
        inputs["attention_mask"] = mask
    return {name: value.to(device) for name, value in inputs.items()}


def loss_of(model: nn.Module, inputs: dict[str, Tensor], **settings: Any) -> Tensor:
    rest = {name: value for name, value in inputs.items() if name != "labels"}
    device = inputs["input_ids"].device.type
    if device == "cpu":  # else the rows that are learnt would be counted, a number that no capture could read
        settings.setdefault("supervised_rows", ALL_ROWS)
    with torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):
        return causal_lm_loss(model, rest, inputs["labels"], **settings)


def run(model: nn.Module, inputs: dict[str, Tensor], factor: float = 1.0, **settings: Any) -> float:
    loss = loss_of(model, inputs, **settings)
    (loss * factor).backward()
    return loss.item()


def gradients(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def same(got: dict[str, Tensor], want: dict[str, Tensor]) -> None:
    assert got.keys() == want.keys()
    for name, value in want.items():
        # Sums of other lengths are rounded in other places.
        bound = 1e-5 if value.device.type == "cpu" else 2e-2
        assert (got[name] - value).norm() <= bound * value.norm(), name
