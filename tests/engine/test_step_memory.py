"""The memory of recorded steps: one pool, given back where memory runs short."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from pyralis.engine import step_graphs
from pyralis.engine.step_graphs import FIRST_STEPS, NO_MEMORY, WARM_UP, use_step_graphs
from pyralis.models.causal_lm import causal_lm_of
from pyralis.models.fast_path import backbone_state
from pyralis.models.surgery import accelerate
from tests.engine.steps import batch, graphs, loss_of, make, run
from tests.engine.tape import TapeRecorder


class ShortOfMemory(TapeRecorder):
    """A device on which so many recordings fail."""

    failures = 0

    def record(self, work: Callable[[], None]) -> Callable[[], None]:
        if self.failures:
            self.failures -= 1
            raise torch.OutOfMemoryError
        return super().record(work)


def test_memory_runs_short() -> None:
    model, recorder = make(torch.device("cpu")), ShortOfMemory()
    engine = use_step_graphs(model, recorder=recorder)
    assert engine is not None
    small, large = batch(torch.device("cpu"), 50), batch(torch.device("cpu"), 100)

    def steps(inputs: dict[str, Tensor], number: int) -> None:
        for _ in range(number):
            model.zero_grad()
            run(model, inputs)

    steps(large, WARM_UP + 1)
    assert engine.replays == 1
    recorder.failures = 1  # with the larger one's memory given back there is enough
    steps(small, WARM_UP + 1)
    assert (engine.replays, engine.reason) == (2, None)
    recorder.failures = 5
    steps(large, 2)
    assert engine.reason == NO_MEMORY
    recorder.failures = 0
    steps(large, 1)
    assert engine.reason == NO_MEMORY, "tried once"
    steps(small, 1)
    assert (engine.replays, engine.reason) == (3, None)


def test_memory_goes_when_no_replay_runs_any_more() -> None:
    """Given up, or with the engine that another one takes the place of, or with what makes the model fast."""
    cpu = torch.device("cpu")
    model = make(cpu)
    events: list[tuple[str, bool]] = []
    alive: Any = object  # none is looked at yet

    class Recorder(TapeRecorder):
        def wait(self) -> None:
            events.append(("wait", alive() is not None))

        def renew(self) -> None:
            super().renew()
            events.append(("renew", alive() is not None))

    ways: tuple[Callable[[Any], Any], ...] = (
        lambda engine: engine.drop(),
        lambda engine: use_step_graphs(model, recorder=Recorder()),
        lambda engine: accelerate(model),  # anew
    )
    for give_up in ways:
        engine = use_step_graphs(model, recorder=Recorder())
        assert engine is not None
        for _ in range(WARM_UP + 2):
            model.zero_grad()
            run(model, batch(cpu))
        assert engine.replays
        alive = weakref.ref(next(iter(engine._steps.values())))
        events.clear()
        give_up(engine)
        assert events == [("wait", True), ("renew", False)]


def test_memory_runs_short_beside_recorded_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    device = torch.device("cpu")
    model, inputs, compute = make(device), batch(device), step_graphs.answer_of_decoder
    engine = graphs(model, device)
    full = [0]

    def cramped(*args: Any) -> Any:
        if full[0]:
            full[0] -= 1
            raise torch.OutOfMemoryError
        return compute(*args)

    monkeypatch.setattr(step_graphs, "answer_of_decoder", cramped)
    for shortages in range(3):
        for _ in range(WARM_UP << shortages):
            run(model, inputs)
            assert engine.reason == FIRST_STEPS
        run(model, inputs)
        assert engine.reason is None
        with torch.no_grad():
            want = loss_of(model, inputs)
            full[0] = 1
            assert torch.equal(loss_of(model, inputs), want)
    full[0] = 1
    with torch.no_grad(), pytest.raises(torch.OutOfMemoryError):
        loss_of(model, inputs)


@pytest.mark.gpu
def test_many_replays_neither_drift_nor_leak() -> None:
    device = torch.device("cuda")
    model = make(device)
    engine = graphs(model, device)
    inputs = batch(device, 256)
    losses: list[float] = []
    memory: list[int] = []
    for step in range(WARM_UP + 200):
        model.zero_grad()
        losses.append(run(model, inputs))
        if step in (WARM_UP + 50, WARM_UP + 199):
            torch.cuda.synchronize()
            memory.append(torch.cuda.memory_reserved())
    assert engine.replays == 200
    assert len(set(losses[WARM_UP:])) == 1
    assert memory[0] == memory[1]


@pytest.mark.gpu
def test_a_larger_shape_takes_the_pool_over() -> None:
    device = torch.device("cuda")
    model = make(device)
    engine = graphs(model, device)
    for tokens in (64, 256, 128, 64, 256):
        for _ in range(WARM_UP + 1):
            model.zero_grad()
            run(model, batch(device, tokens))
        assert engine.reason is None
    kept = backbone_state(causal_lm_of(model).model).kept
    assert kept.weights.layers[0].served
