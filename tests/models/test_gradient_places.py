"""Gradients moved away from their buffer (`p.grad.data =`, `.to()`) are never taken for those that lie there."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from pyralis.engine.optimizer import FlatAdamW
from pyralis.train.flat_optimizer import flat_adamw
from tests.engine.steps import batch, make, run

CPU = torch.device("cpu")


def noisy(model: Any) -> None:
    """As differential privacy is often written."""
    for p in model.parameters():
        if p.grad is not None:
            p.grad.data = p.grad.data + 1


@pytest.mark.parametrize("to_none", [True, False])
def test_a_gradient_whose_data_is_replaced(to_none: bool) -> None:
    model, inputs = make(CPU), batch(CPU)
    trained = [p for p in model.parameters() if p.requires_grad]
    run(model, inputs)
    wanted = [p.grad.clone() for p in trained]
    for _ in range(3):
        noisy(model)
        assert all(torch.equal(p.grad, want + 1) for p, want in zip(trained, wanted))
        model.zero_grad(set_to_none=to_none)
        run(model, inputs)
        assert all(torch.equal(p.grad, want) for p, want in zip(trained, wanted))


def test_the_flat_optimizer_reads_it() -> None:
    models = make(CPU), make(CPU)
    inputs = batch(CPU)
    ours: Any = flat_adamw(models[0], [p for p in models[0].parameters() if p.requires_grad], lr=1e-2)
    theirs = torch.optim.AdamW([p for p in models[1].parameters() if p.requires_grad], lr=1e-2)
    assert isinstance(ours, FlatAdamW)
    for _ in range(3):
        for model, optimizer in zip(models, (ours, theirs)):
            run(model, inputs)
            noisy(model)
            optimizer.step()
            optimizer.zero_grad()
    for a, b in zip(models[0].parameters(), models[1].parameters()):
        assert (a - b).norm() <= 1e-5 * b.norm()
