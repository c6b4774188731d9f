"""A recorded step is held against the same step run before it is believed."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
from torch import Tensor

from pyralis.engine import proof, recordable
from pyralis.engine.buckets import Bucketed
from pyralis.engine.captured_step import CapturedStep
from pyralis.engine.step_check import LIMITS, Checked, compared, measured
from pyralis.engine.step_gradients import StepGradients
from pyralis.engine.step_graphs import ACCUMULATED, WARM_UP, use_step_graphs
from pyralis.models.gradients import FlatGradients
from tests.engine.faults import Wrong
from tests.engine.steps import batch, gradients, graphs, make, run, same

CPU = torch.device("cpu")


def spoilt(model: Any, which: int, fault: Any) -> Any:
    return use_step_graphs(model, recorder=Wrong(which, fault))


def test_equal_steps_are_said_once(caplog: pytest.LogCaptureFixture) -> None:
    model = make(CPU)
    engine = graphs(model, CPU)
    with caplog.at_level(logging.INFO, logger="pyralis"):
        for tokens in (100, 50):
            for _ in range(WARM_UP + 1):
                run(model, batch(CPU, tokens))
    assert len(engine.checks) == 2
    for found in engine.checks:
        assert found.fault is None
        assert found.loss == found.gradient == 0
        assert found.bucket < 1e-6
    (said,) = [r.getMessage() for r in caplog.records if "are checked" in r.getMessage()]
    assert "loss 0.0e+00" in said


@pytest.mark.parametrize("set_to_none", [True, False])
def test_a_check_leaves_one_micro_batch_s_gradient(set_to_none: bool) -> None:
    """It comes in the middle of an accumulation, whose buffers the replays write to."""
    plain, recorded = make(CPU), make(CPU)
    engine = graphs(recorded, CPU)
    for step in range(2):
        for model in (plain, recorded):
            model.zero_grad(set_to_none=set_to_none)
            for seed in range(WARM_UP):
                run(model, batch(CPU, seed=seed + step), factor=0.5)
        same(gradients(recorded), gradients(plain))
    assert engine.replays == WARM_UP
    assert len(engine.checks) == 1


FAULTS = {
    "one gradient": 1.5,
    "NaN": float("nan"),
    "zero": 0.0,
}


@pytest.mark.parametrize("factor", FAULTS.values(), ids=FAULTS)
def test_a_wrong_gradient(factor: float, caplog: pytest.LogCaptureFixture) -> None:
    """Recorded steps are given up, training goes on with what is run, and why is said once, with the tensor's name."""
    plain, recorded = make(CPU), make(CPU)
    named = {name: p for name, p in recorded.named_parameters() if p.requires_grad}
    name = next(name for name in named if "layers.1.self_attn.v_proj.lora_B" in name)

    def fault() -> None:
        with torch.no_grad():
            named[name].grad.mul_(factor)  # type: ignore[union-attr]

    engine = spoilt(recorded, 1, fault)
    with caplog.at_level(logging.WARNING, logger="pyralis"):
        for seed in range(WARM_UP + 3):
            for model in (plain, recorded):
                model.zero_grad()
                run(model, batch(CPU, seed=seed))
            same(gradients(recorded), gradients(plain))
    assert engine.replays == 0
    assert not engine._steps
    (said,) = [r.getMessage() for r in caplog.records if "without CUDA graphs" in r.getMessage()]
    assert name.removeprefix("base_model.model.") in said
    assert "expected at most" in said


def test_a_wrong_loss(monkeypatch: pytest.MonkeyPatch) -> None:
    model, made = make(CPU), list[CapturedStep]()

    def kept(*args: Any) -> CapturedStep:
        made.append(CapturedStep(*args))
        return made[-1]

    monkeypatch.setattr(proof, "CapturedStep", kept)
    engine = spoilt(model, 0, lambda: loss_in(made[0]).mul_(1.01))
    losses = [run(model, batch(CPU)) for _ in range(WARM_UP + 2)]
    assert len(set(losses)) == 1
    assert "its loss differs by 1.0e-02" in str(engine.reason)


def loss_in(step: Any) -> Tensor:
    loss: Tensor = step._loss
    return loss


def test_a_bucket_that_is_not_the_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Padding that real tokens see: the batch at its bucket is compared with the batch as it came."""
    model, to_bucket = make(CPU), recordable.to_bucket

    def careless(*args: Any, **settings: Any) -> Any:
        made = to_bucket(*args, **settings)
        assert isinstance(made, Bucketed)
        made.input_ids[:, 10] = 7
        return made

    monkeypatch.setattr(recordable, "to_bucket", careless)
    engine = graphs(model, CPU)
    for _ in range(WARM_UP + 1):
        run(model, batch(CPU))
    assert "the loss of the batch at its padded length differs" in str(engine.reason)
    assert engine.replays == 0


def test_a_batch_that_teaches_nothing_proves_nothing() -> None:
    model = make(CPU)
    engine, empty = graphs(model, CPU), batch(CPU)
    empty["labels"][:] = -100
    for _ in range(2 * WARM_UP + 2):
        run(model, empty)
    assert engine.replays == len(engine.checks) == 0
    for _ in range(WARM_UP + 1):
        run(model, batch(CPU))
    assert (engine.replays, len(engine.checks)) == (1, 1)
    assert run(model, empty) == 0
    assert engine.reason is None


def test_gradients_too_large_to_be_kept_aside(monkeypatch: pytest.MonkeyPatch) -> None:
    """As of a whole model's: the check waits for a micro-batch before which nothing is accumulated."""
    model = make(CPU)
    engine = graphs(model, CPU)
    monkeypatch.setattr(StepGradients, "can_be_kept_aside", lambda self: not self._accumulated())
    for _ in range(WARM_UP + 2):
        run(model, batch(CPU))
    assert engine.reason == ACCUMULATED
    model.zero_grad()
    run(model, batch(CPU))
    assert engine.replays == 1


def test_a_loss_s_gradient_is_that_of_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """In float16 a scaled loss's: without its scale all gradients might be zero, and nothing would ever be proven."""
    model, used = make(CPU), list[float]()
    backward = CapturedStep.backward

    def noted(self: CapturedStep, grad: Tensor) -> None:
        used.append(float(grad))
        backward(self, grad)

    monkeypatch.setattr(CapturedStep, "backward", noted)
    engine = graphs(model, CPU)
    for factor in (1.0, 4096.0, 2048.0):
        run(model, batch(CPU), factor=factor)
    assert used == [4096.0, 2048.0]
    assert engine.reason is None


def test_what_a_check_can_see() -> None:
    """Any element of a small tensor, the norm of a large one, and a small tensor beside large ones."""
    parameters = [
        torch.nn.Parameter(torch.randn(n, generator=torch.Generator().manual_seed(n))) for n in (300, 1 << 18)
    ]
    parameters[0].data *= 1e-2
    places = StepGradients(parameters, FlatGradients(parameters))
    names = {id(p): str(p.numel()) for p in parameters}

    def check(change: Any = None, dtype: torch.dtype = torch.float32) -> Checked:
        def work(change: Any) -> Tensor:
            for p in parameters:
                p.grad.add_(p.detach())  # type: ignore[union-attr]
            if change is not None:
                change()
            return torch.tensor(2.0)

        with torch.no_grad():
            run = measured(places, lambda: work(None))
            return compared(run, measured(places, lambda: work(change)), None, parameters, names, dtype)

    assert check().fault is None
    assert "300" in str(check(lambda: parameters[0].grad[17].add_(0.1)).fault)  # type: ignore[index]
    assert f"{1 << 18}" in str(check(lambda: parameters[1].grad[1::2].zero_()).fault)  # type: ignore[index]
    assert check(lambda: parameters[1].grad.mul_(1.01), torch.bfloat16).fault is None  # type: ignore[union-attr]
    assert check(lambda: parameters[1].grad.mul_(1 + 2 * LIMITS[torch.bfloat16]), torch.bfloat16).fault  # type: ignore[union-attr]
    assert all(p.grad is None for p in parameters)
