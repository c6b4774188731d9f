"""Matrices kept, made at once or one after another: the same numbers, and the memory that is predicted."""

from __future__ import annotations

import gc
from typing import Any, get_args

import pytest
import torch
from peft import LoraConfig

from pyralis.memory.footprint import standing_bytes
from pyralis.models.checkpointing import choose_save_policy
from pyralis.models.fast_path import backbone_state
from pyralis.models.policy import SavePolicy
from pyralis.models.residency import Residency, choose_residency, residency
from pyralis.models.surgery import decoder_layers
from pyralis.models.workspace import Workspace
from tests.memory.test_footprint import build, describe

TOKENS = 24
DORA = LoraConfig(r=8, target_modules="all-linear", init_lora_weights=False, use_dora=True)
DROPOUT = LoraConfig(r=8, target_modules="all-linear", init_lora_weights=False, lora_dropout=0.5)
PLAIN = LoraConfig(r=8, target_modules="all-linear", init_lora_weights=False)


def step(base: Any) -> list[torch.Tensor]:
    """Output and gradients of a step, and of one more with other adapters and masks."""
    found = []
    for scale in (1.0, 0.5):
        torch.manual_seed(0)
        with torch.no_grad():
            for name, parameter in base.named_parameters():
                if "lora_" in name:
                    parameter.mul_(scale)
        base.zero_grad()
        x = torch.randn(1, TOKENS, 64, requires_grad=True)
        out = base.model(inputs_embeds=x).last_hidden_state
        out.square().sum().backward()
        found += [out.detach(), x.grad, *(p.grad.clone() for p in base.parameters() if p.requires_grad)]
    return found


@pytest.mark.parametrize(("policy", "tile"), [("keep", None), ("recompute_layer", None), ("recompute_layer", 10)])
@pytest.mark.parametrize("lora", [PLAIN, DORA, DROPOUT], ids=["lora", "dora", "dropout"])
def test_the_numbers_are_the_same(lora: LoraConfig, policy: SavePolicy, tile: int | None) -> None:
    results = []
    for choice in get_args(Residency):
        torch.manual_seed(1)
        base = build("llama-biases", four_bit=True, lora=lora)
        layers = decoder_layers(base)
        choose_save_policy(layers, policy, tile)
        choose_residency(layers, choice)
        assert [residency(layer) for layer in layers] == [choice] * 2
        results.append(step(base))
    assert len(results) == 3
    for result in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], result, strict=True))


def buffers(base: Any) -> dict[int, int]:
    """Bytes of all workspaces, by address."""
    gc.collect()
    found = {}
    for layer in backbone_state(base.model).kept.weights.layers:
        for workspace in [layer.workspace, *(b._workspace for b in layer._bases.values())]:
            found.update({buffer.data_ptr(): buffer.nbytes for buffer in workspace._buffers.values()})
    return found


def test_memory_is_what_is_predicted_and_given_back_by_a_change() -> None:
    base = build("llama", four_bit=True)
    layers, shape = decoder_layers(base), describe(base)
    choose_save_policy(layers, "recompute_layer")
    sizes = {}
    for choice in ("at once", "in turn", "kept", "in turn", "at once"):
        choose_residency(layers, choice)
        step(base)
        kept = (choice == "kept",) * 2
        sizes[choice] = sum(buffers(base).values())
        assert sizes[choice] == standing_bytes(shape, kept, 8, in_turn=choice == "in turn").matrices
    assert sizes["in turn"] < sizes["at once"] < sizes["kept"]
    assert sizes["in turn"] == max(4 * group.rows * group.columns for group in shape.layers[0].groups)


def test_a_buffer_lives_as_long_as_somebody_holds_it() -> None:
    workspace = Workspace()
    held = workspace.take(512, torch.float32, torch.device("cpu"), "at once")
    assert workspace.take(256, torch.float32, torch.device("cpu"), "at once") is held
    assert workspace.take(256, torch.float32, torch.device("cpu"), "in turn") is not held
    del held
    gc.collect()
    assert not workspace._buffers
