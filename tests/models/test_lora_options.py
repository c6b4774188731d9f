"""Every option of LoRA runs fast or says why not, and no number differs: loss and gradients after a step as stock's."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

from pyralis.models.families import FAMILIES as SERVED
from pyralis.models.fused import FusedBlock
from pyralis.models.surgery import accelerate, report
from tests.models.spec_block import block_in_place
from tests.tiny import build_tiny_model

EVERY = tuple(family.name for family in SERVED)
IDS = torch.randint(4, 300, (2, 24), generator=torch.Generator().manual_seed(0))
ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
FAST: dict[str, dict[str, Any]] = {
    "rank 1": {"r": 1},
    "rank 256": {"r": 256},
    "odd ranks": {"r": 5, "rank_pattern": {"k_proj": 1, "up_proj": 17}, "alpha_pattern": {"v_proj": 3}},
    "rsLoRA": {"use_rslora": True},
    "alpha 0": {"lora_alpha": 0},
    "biases of LoRA": {"lora_bias": True},
    "all biases trained": {"bias": "all"},
    "biases of adapted layers trained": {"bias": "lora_only", "target_modules": ["q_proj", "down_proj"]},
    "attention only": {"target_modules": ["q_proj", "v_proj"]},
    "MLP only": {"target_modules": ["gate_proj", "down_proj"]},
    "one layer": {"layers_to_transform": [1]},
    "gaussian": {"init_lora_weights": "gaussian"},
    "orthogonal": {"init_lora_weights": "orthogonal", "r": 8},
    "PiSSA": {"init_lora_weights": "pissa"},
    "PiSSA, approximate": {"init_lora_weights": "pissa_niter_4"},
    "OLoRA": {"init_lora_weights": "olora"},
    "embeddings and head trained": {"modules_to_save": ["embed_tokens", "lm_head"]},
    "LoRA on embeddings and head": {"target_modules": [*ALL, "embed_tokens", "lm_head"]},
    "some tokens trained": {"trainable_token_indices": [1, 5]},
    "dropout in eval mode": {"lora_dropout": 0.3},
}
STOCK: dict[str, tuple[dict[str, Any], str]] = {
    "DoRA": ({"use_dora": True}, "DoRA"),
    "norms trained as modules to save": ({"modules_to_save": ["input_layernorm"]}, "input_layernorm is peft."),
}


def tuned(options: dict[str, Any]) -> Any:
    model = build_tiny_model("llama", attention_bias=True, mlp_bias=True)
    torch.manual_seed(0)
    config = LoraConfig(**{"r": 8, "lora_alpha": 12, "target_modules": ALL, **options})
    model = get_peft_model(model, config)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad and "lora_A" not in name:
                parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    return model.eval()


def step(model: nn.Module) -> tuple[Tensor, dict[str, Tensor]]:
    loss = model(IDS, use_cache=False).logits.square().mean()
    model.zero_grad()
    loss.backward()
    return loss.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def same(got: tuple[Tensor, dict[str, Tensor]], want: tuple[Tensor, dict[str, Tensor]]) -> None:
    torch.testing.assert_close(got[0], want[0], rtol=2e-6, atol=0)
    assert got[1].keys() == want[1].keys()
    for name, gradient in want[1].items():
        assert (got[1][name] - gradient).norm() <= 2e-5 * gradient.norm() + 1e-9, name


def run(options: dict[str, Any]) -> list[str]:
    """The reasons of a fast model's layers, after two steps whose numbers were stock's."""
    model = tuned(options)
    stock = copy.deepcopy(model)
    optimizers = [torch.optim.SGD([p for p in m.parameters() if p.requires_grad], 0.1) for m in (model, stock)]
    with block_in_place(FusedBlock()):
        before = accelerate(model, families=EVERY)
        for _ in range(2):
            same(step(model), step(stock))
            for optimizer in optimizers:
                optimizer.step()
        return [layer.reason for layer in (report(model) if before.fast_layers else before).layers]


@pytest.mark.parametrize("name", FAST)
def test_runs_fast(name: str) -> None:
    assert run(FAST[name]) == ["", ""]


@pytest.mark.parametrize("name", STOCK)
def test_runs_stock_and_says_why(name: str) -> None:
    options, expected = STOCK[name]
    assert all(expected in reason for reason in run(options))
