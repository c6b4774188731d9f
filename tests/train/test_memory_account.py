"""What a run's memory holds, counted: every kind of training, shared storage once."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from pyralis.engine.flat_parameters import flatten_parameters
from pyralis.engine.optimizer import FlatAdamW
from pyralis.train.memory_account import MemoryAccount, MemoryCount
from tests.tiny import build_tiny_model

CPU = torch.device("cpu")


def counted(model: nn.Module, optimizer: Any) -> MemoryAccount:
    """After one step, as the Trainer takes it."""
    count = MemoryCount(CPU)
    for _ in range(2):
        sum(p.sum() for p in model.parameters() if p.requires_grad).backward()  # type: ignore[union-attr]
        count.on_pre_optimizer_step(model=model, optimizer=SimpleNamespace(optimizer=optimizer))
        optimizer.step()
        model.zero_grad()
        count.on_step_end(model=model, optimizer=SimpleNamespace(optimizer=optimizer))
    assert count.found is not None
    return count.found


def size(parameters: Any) -> int:
    return sum(p.numel() * p.element_size() for p in parameters)


def test_an_adapter() -> None:
    model = get_peft_model(build_tiny_model(), LoraConfig(r=8, target_modules="all-linear"))
    trained = [p for p in model.parameters() if p.requires_grad]
    frozen = [p for p in model.parameters() if not p.requires_grad]
    found = counted(model, torch.optim.AdamW(trained))
    buffers = size(model.buffers())
    assert (found.adapters, found.gradients) == (size(trained), size(trained))
    assert found.weights == size(frozen) + buffers
    assert found.optimizer == 2 * size(trained) + 4 * len(trained)  # and a count of steps each
    assert found.total == found.weights + found.adapters + found.gradients + found.optimizer


def test_a_whole_model_whose_head_is_its_embedding() -> None:
    model = build_tiny_model(tie_word_embeddings=True)
    found = counted(model, torch.optim.SGD(model.parameters(), lr=0.1))
    own = size({id(p): p for p in model.parameters()}.values())
    assert found == MemoryAccount(own + size(model.buffers()), 0, own, 0)


@pytest.mark.parametrize("rounding", ["nearest", "split"])
def test_flat_buffers_are_counted_once(rounding: Any) -> None:
    model = build_tiny_model().to(torch.bfloat16 if rounding == "split" else torch.float32)
    flatten_parameters(list(model.parameters()))
    optimizer = FlatAdamW(model.parameters(), rounding=rounding)
    for p, view in zip(optimizer.parameters, optimizer.grad_views):
        p.grad = view  # where the fast path's backward writes them
    found = counted(model, optimizer)
    values = optimizer.layout.values.numel()
    element = optimizer.layout.values.element_size()
    assert found.gradients == values * element
    assert found.weights == values * element + size(model.buffers())
    expected = values * (8 + (2 if rounding == "split" else 0))
    assert expected <= found.optimizer < expected + 64  # what counts the steps


def test_a_model_in_parts_is_not_counted() -> None:
    count = MemoryCount(CPU, in_parts=True)
    count.on_pre_optimizer_step(model=None, optimizer=None)
    count.on_step_end(model=None, optimizer=None)
    assert count.found is None
