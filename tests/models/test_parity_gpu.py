"""Whole models on the GPU, through the real kernels: errors to float64 against those of stock on the same GPU."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from pyralis.models.causal_lm import causal_lm_loss
from pyralis.models.families import FAMILIES as SERVED
from pyralis.models.fused import FusedBlock
from pyralis.models.surgery import accelerate, decoder_layers, report
from tests.models.spec_block import SpecBlock, block_in_place
from tests.models.test_parity import NAMES, with_lora
from tests.tiny import FAMILIES, VARIANTS, build_tiny_model

pytestmark = pytest.mark.gpu
EVERY = tuple(family.name for family in SERVED)
# Heads of 64 and rows of a few hundred tokens: what the fast attention backends and tiles are made for.
SIZES = {
    "hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 512,
    "initializer_range": 0.05,
}  # fmt: skip


def build(name: str, dtype: torch.dtype) -> Any:
    family, fields = VARIANTS.get(name, (name, {}))
    sizes = SIZES if "head_dim" not in FAMILIES[family] else {**SIZES, "head_dim": fields.get("head_dim", 64)}
    model = build_tiny_model(family, **{**fields, **sizes, "num_key_value_heads": 2})
    return with_lora(model.to(dtype), some=False)


def batch(layout: str) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(5)
    ids = torch.randint(4, 500, (2, 200), generator=generator)
    labels = ids.clone()
    labels[:, :20] = -100
    inputs: dict[str, Any] = {"input_ids": ids, "labels": labels}
    if layout == "packed":
        positions = torch.cat([torch.arange(70), torch.arange(130)])
        labels[:, 70] = -100
        inputs["position_ids"] = positions.expand(2, -1).contiguous()
    else:
        mask = torch.ones_like(ids)
        if layout == "right":
            mask[1, 151:] = 0
        else:
            mask[1, :49] = 0
            labels[1, 49] = -100
        labels[mask == 0] = -100
        inputs["attention_mask"] = mask
    return {name: value.cuda() for name, value in inputs.items()}


def gradients(model: nn.Module, layout: str, dtype: torch.dtype) -> tuple[float, torch.Tensor]:
    inputs = batch(layout)
    labels = inputs.pop("labels")
    model.zero_grad()
    with torch.autocast("cuda", dtype, enabled=dtype in (torch.bfloat16, torch.float16)):
        loss = causal_lm_loss(model, inputs, labels)
    loss.backward()
    flat = torch.cat([p.grad.double().flatten() for p in model.parameters() if p.grad is not None])
    return loss.double().item(), flat


def relative(got: torch.Tensor, want: torch.Tensor) -> float:
    return float((got - want).norm() / want.norm())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("layout", ["right", "left", "packed"])
@pytest.mark.parametrize("name", NAMES)
def test_gradients(name: str, layout: str, dtype: torch.dtype) -> None:
    model = build(name, dtype).cuda()
    exact = build(name, dtype).double().cuda()
    with block_in_place(SpecBlock()):
        accelerate(exact, families=EVERY)
        exact_loss, want = gradients(exact, layout, torch.float64)
    stock_loss, stock = gradients(model, layout, dtype)
    with block_in_place(FusedBlock()):
        accelerate(model, families=EVERY)
        loss, got = gradients(model, layout, dtype)
        assert report(model).fast_layers == len(decoder_layers(model)), report(model).lines
    floor = 1e-6 if dtype == torch.float32 else 1e-4
    assert abs(loss - exact_loss) <= 1.5 * abs(stock_loss - exact_loss) + 3 * floor * exact_loss
    assert relative(got, want) <= 1.5 * relative(stock, want) + floor, (relative(got, want), relative(stock, want))
