"""What may come between the forward of a recorded step and its backward, or between a backward and its optimizer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from pyralis.engine.step_graphs import WARM_UP, use_step_graphs
from pyralis.models.causal_lm import causal_lm_loss, causal_lm_of
from pyralis.models.group_state import LayoutOptions
from pyralis.models.surgery import fused_weights
from tests.engine.steps import ALL_ROWS, batch, gradients, graphs, loss_of, make, run, same

CPU = torch.device("cpu")


@torch.no_grad()
def evaluated_without_adapters(model: Any) -> None:
    with model.disable_adapter():
        model.eval()
        model(**batch(CPU, 90, seed=7))
        model.train()


@torch.no_grad()
def many_states(model: Any) -> None:
    """More of them than a layer keeps the buffers of."""
    for scale in range(3, 9):
        for module in model.modules():
            if isinstance(getattr(module, "scaling", None), dict):
                before, module.scaling["default"] = module.scaling["default"], float(scale)
        model(**batch(CPU, 30))
        for module in model.modules():
            if isinstance(getattr(module, "scaling", None), dict):
                module.scaling["default"] = before


def released(model: Any) -> None:
    weights = fused_weights(model)
    assert weights is not None
    weights.release()


def lay_out(model: Any, wide: bool) -> None:
    with torch.no_grad():
        model(**batch(CPU))
    weights = fused_weights(model)
    assert weights is not None
    for layer in weights.layers:
        layer.options = LayoutOptions(concatenate=wide, resident=wide)
    weights.release()


BETWEEN: dict[str, Callable[[Any], Any]] = {
    "an evaluation without adapters": evaluated_without_adapters,
    "other states of the layers": many_states,
    "buffers given up": released,
    "no more recorded steps": lambda model: use_step_graphs(model, "off"),
}


@pytest.mark.parametrize("between", BETWEEN.values(), ids=BETWEEN)
@pytest.mark.parametrize("wide", [False, True])
def test_between_forward_and_backward(between: Callable[[Any], Any], wide: bool) -> None:
    """wide: matrices in the dtype of autocast, kept between uses, LoRA's B and A in them."""
    plain, recorded = make(CPU), make(CPU)
    engine = graphs(recorded, CPU)
    losses = []
    for model in (plain, recorded):
        lay_out(model, wide)
    for seed in range(WARM_UP + 2):
        inputs = batch(CPU, seed=seed)
        rest = {name: value for name, value in inputs.items() if name != "labels"}
        for model in (plain, recorded):
            model.zero_grad()
            with torch.autocast("cpu", torch.bfloat16, enabled=wide):
                loss = causal_lm_loss(model, rest, inputs["labels"], supervised_rows=ALL_ROWS)
                if seed > WARM_UP:
                    between(model)
            loss.backward()
            losses.append(loss.item())
        for name, want in gradients(plain).items():
            bound = 2e-2 if wide else 1e-5
            assert (gradients(recorded)[name] - want).norm() <= bound * want.norm(), name
    assert losses[1::2] == pytest.approx(losses[::2], rel=1e-2 if wide else 1e-5)
    assert engine.replays == 2


@pytest.mark.parametrize("to_none", [True, False])
def test_the_data_of_gradients_replaced(to_none: bool) -> None:
    """As differential privacy is often written."""
    plain, recorded = make(CPU), make(CPU)
    engine = graphs(recorded, CPU)
    for seed in range(WARM_UP + 3):
        for model in (plain, recorded):
            model.zero_grad(set_to_none=to_none)
            run(model, batch(CPU, seed=seed))
            for p in model.parameters():
                if p.grad is not None:
                    p.grad.data = p.grad.data + 1
            run(model, batch(CPU, seed=seed + 1))
        same(gradients(recorded), gradients(plain))
    assert engine.reason is None


def test_a_forward_whose_loss_is_let_go() -> None:
    """As after an exception in a trainer's callback."""
    model = make(CPU)
    engine = graphs(model, CPU)
    for _ in range(WARM_UP + 1):
        model.zero_grad()
        run(model, batch(CPU))
    want = gradients(model)
    loss_of(model, batch(CPU, seed=3))
    model.zero_grad()
    run(model, batch(CPU))
    same(gradients(model), want)
    assert engine.replays == 3


def test_every_kind_of_num_items() -> None:
    plain, recorded = make(CPU), make(CPU)
    engine = graphs(recorded, CPU)
    kinds: list[Any] = [
        70.0,
        torch.tensor(60),
        50,
        torch.tensor([40.0]),
        torch.tensor(0),
        torch.tensor(33, dtype=torch.int32),
    ]
    for items in kinds:
        for model in (plain, recorded):
            model.zero_grad()
        losses = [run(model, batch(CPU), num_items=items) for model in (plain, recorded)]
        assert losses[1] == pytest.approx(losses[0], rel=1e-5)
        same(gradients(recorded), gradients(plain))
    assert engine.replays == len(kinds) - WARM_UP


def test_a_model_that_is_pickled(tmp_path: Any) -> None:
    model = causal_lm_of(make(CPU))
    graphs(model, CPU)
    for _ in range(WARM_UP + 1):
        loss = run(model, batch(CPU))
    torch.save(model, tmp_path / "model.pt")
    again = torch.load(tmp_path / "model.pt", weights_only=False)
    assert run(again, batch(CPU)) == pytest.approx(loss, rel=1e-5)
