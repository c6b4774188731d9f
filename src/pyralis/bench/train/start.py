"""Where every peer starts: the same adapter and the same tokens, from seeds."""

from __future__ import annotations

import zlib
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from pyralis.bench.train.settings import Shape
from pyralis.errors import ModelError

FIRST_TOKEN = 4  # those before it are special
B_STD = 0.01  # with A as PEFT starts it, LoRA is then 4 % of a layer's output: it takes part in the loss from the start


@torch.no_grad()
def start_adapter(model: nn.Module) -> None:
    """Fill every trained LoRA matrix: A uniform as PEFT does, B normal and not zero, so that A has a gradient too.

    Values depend on the layer's name alone, whatever wraps the model, and are exact in bfloat16, to which TRL rounds.

    Raises:
        ModelError: nothing to fill, or trained weights besides LoRA's.
    """
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    other = [name for name in trained if ".lora_A." not in name and ".lora_B." not in name]
    if other or not trained:
        raise ModelError(f"expected LoRA's weights alone to be trained, not {', '.join(other[:3]) or 'nothing'}")
    for name, parameter in trained.items():
        key = name[name.index("layers.") :]
        generator = torch.Generator().manual_seed(zlib.crc32(key.replace(".default", "").encode()))
        if ".lora_A." in key:
            bound = parameter.shape[1] ** -0.5
            values = (torch.rand(parameter.shape, generator=generator) * 2 - 1) * bound
        else:
            values = torch.randn(parameter.shape, generator=generator) * B_STD
        parameter.copy_(values.bfloat16())


def snapshot(model: nn.Module) -> dict[str, Tensor]:
    """Copies of what is trained, on the CPU."""
    return {name: p.detach().cpu().clone() for name, p in model.named_parameters() if p.requires_grad}


@torch.no_grad()
def put_back(model: nn.Module, kept: Mapping[str, Tensor]) -> None:
    """Start anew from a snapshot, without gradients."""
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            parameter.copy_(kept[name])
            parameter.grad = None


def make_batch(shape: Shape, vocabulary: int) -> dict[str, Tensor]:
    """Random tokens, the same in every step: what the first steps learn shows in the losses of the next ones.

    input_ids, attention_mask (ones) and labels, each [B, S] int64 on the CPU.
    """
    generator = torch.Generator().manual_seed(shape.batch * 1_000_003 + shape.tokens)
    ids = torch.randint(FIRST_TOKEN, vocabulary, (shape.batch, shape.tokens), generator=generator)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids.clone()}
