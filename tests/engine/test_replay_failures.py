"""Whatever a recording or a replay raises, training goes on with the same numbers; a lost device says what to do."""

from __future__ import annotations

import gc
import logging
import weakref
from typing import Any

import pytest
import torch

from pyralis.engine.recorders import mended
from pyralis.engine.step_graphs import FIRST_STEPS, WARM_UP, use_step_graphs
from pyralis.errors import DeviceError
from tests.engine.faults import Failing
from tests.engine.steps import batch, gradients, graphs, loss_of, make, run, same

CPU = torch.device("cpu")
SHORT = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")


def engine_on(model: Any, recorder: Failing) -> Any:
    return use_step_graphs(model, recorder=recorder)


def both(plain: Any, recorded: Any, times: int = 1, **settings: Any) -> None:
    for seed in range(times):
        torch.manual_seed(seed)
        losses = []
        for model in (plain, recorded):
            torch.manual_seed(seed)
            losses.append(run(model, batch(CPU, 64, "packed", seed=seed), **settings))
        assert losses[1] == pytest.approx(losses[0], rel=1e-5)
        same(gradients(recorded), gradients(plain))


@pytest.mark.parametrize(
    "error", [TypeError("a launcher's"), KeyError("x"), RuntimeError("capturing"), AssertionError()]
)
@pytest.mark.parametrize("which", [0, 1], ids=["forward", "backward"])
def test_a_recording_that_fails(error: Exception, which: int, caplog: pytest.LogCaptureFixture) -> None:
    plain, recorded = make(CPU), make(CPU)
    recorder = Failing(recordings={which: error})
    engine = engine_on(recorded, recorder)
    with caplog.at_level(logging.WARNING, logger="pyralis"):
        both(plain, recorded, WARM_UP + 2)
    assert (engine.replays, recorder.mended) == (0, 1)
    (said,) = [r.getMessage() for r in caplog.records]
    assert "it cannot be recorded" in said


def test_an_interrupted_recording() -> None:
    model, recorder = make(CPU), Failing(recordings={1: KeyboardInterrupt()})
    engine = engine_on(model, recorder)
    for _ in range(WARM_UP):
        run(model, batch(CPU))
    before = gradients(model)
    with pytest.raises(KeyboardInterrupt):
        run(model, batch(CPU))
    assert recorder.mended == 1
    same(gradients(model), before)
    run(model, batch(CPU))
    assert engine.replays == 1


@pytest.mark.parametrize("number", [0, 1], ids=["forward", "backward"])
@pytest.mark.parametrize("accumulated", [False, True])
def test_a_replay_that_fails(number: int, accumulated: bool, caplog: pytest.LogCaptureFixture) -> None:
    """The same loss and gradients with the same masks, from a forward and backward that are run; and no more graphs."""
    plain, recorded = (make(CPU, dropout=0.2, target_modules=["q_proj"]) for _ in range(2))
    recorder = Failing()
    engine = engine_on(recorded, recorder)
    both(plain, recorded, WARM_UP + 1)
    recorder.replays[recorder.replayed + number] = RuntimeError("CUDA error: invalid argument")
    for model in (plain, recorded):
        for i, p in enumerate(model.parameters()):
            if not accumulated:
                p.grad = None
            elif p.requires_grad and i % 2:
                p.grad = torch.full_like(p, 0.5)  # somebody else's tensor
    with caplog.at_level(logging.WARNING, logger="pyralis"):
        both(plain, recorded, 3, factor=0.25)
    assert engine.replays == (1 if number == 0 else 2)
    assert recorder.mended == 1
    (said,) = [r.getMessage() for r in caplog.records]
    assert "a recorded step cannot be replayed: CUDA error: invalid argument" in said


@pytest.mark.parametrize("number", [0, 1], ids=["forward", "backward"])
@pytest.mark.parametrize("error", [SHORT, RuntimeError("CUDA error: out of memory")], ids=["torch's", "CUDA's"])
def test_memory_runs_short_in_a_replay(number: int, error: Exception) -> None:
    """Then steps are recorded anew, later."""
    plain, recorded = make(CPU), make(CPU)
    recorder = Failing()
    engine = engine_on(recorded, recorder)
    both(plain, recorded, WARM_UP + 1)
    recorder.replays[recorder.replayed + number] = error
    both(plain, recorded)
    assert not engine._steps
    both(plain, recorded, 2 * WARM_UP)
    assert engine.reason == FIRST_STEPS
    both(plain, recorded)
    assert engine.reason is None


@pytest.mark.parametrize("number", [0, 1], ids=["forward", "backward"])
def test_a_check_that_fails(number: int) -> None:
    plain, recorded = make(CPU), make(CPU)
    recorder = Failing()
    engine = engine_on(recorded, recorder)
    recorder.replays[number] = RuntimeError("CUDA error: invalid argument")
    both(plain, recorded, WARM_UP + 2)
    assert engine.replays == 0
    assert "it cannot be recorded: CUDA error: invalid argument" in str(engine.reason)


@pytest.mark.parametrize("number", [0, 1], ids=["forward", "backward"])
def test_a_lost_device(number: int, monkeypatch: pytest.MonkeyPatch) -> None:
    model, recorder = make(CPU), Failing()
    engine_on(model, recorder)
    for _ in range(WARM_UP + 1):
        run(model, batch(CPU))

    def lost() -> None:
        raise RuntimeError("CUDA error: device-side assert triggered\nmore")

    monkeypatch.setattr(recorder, "mend", lost)
    recorder.replays[recorder.replayed + number] = RuntimeError("CUDA error: an illegal memory access")
    with pytest.raises(DeviceError, match=r"illegal memory access.*device-side assert.*`cuda_graph: off`"):
        run(model, batch(CPU))


def test_too_little_memory_to_mend_is_no_lost_device(monkeypatch: pytest.MonkeyPatch) -> None:
    recorder = Failing()

    def short() -> None:
        raise SHORT

    monkeypatch.setattr(recorder, "mend", short)
    mended(recorder, SHORT)


def test_a_loss_that_is_kept_keeps_no_graph() -> None:
    model = make(CPU)
    engine = graphs(model, CPU)
    losses = []
    for _ in range(WARM_UP + 2):
        losses.append(loss_of(model, batch(CPU)))
        losses[-1].backward()
    (step,) = engine._steps.values()
    kept = weakref.ref(step)
    del step
    engine.drop()
    assert kept() is None


def test_recorded_steps_die_with_their_model() -> None:
    model = make(CPU)
    engine = graphs(model, CPU)
    for _ in range(WARM_UP + 2):
        run(model, batch(CPU))
    dead = [weakref.ref(engine), *map(weakref.ref, engine._steps.values())]
    del model, engine
    gc.collect()
    assert [ref() for ref in dead] == [None, None]


def test_the_collector_waits_while_a_step_is_recorded(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    class Looking(Failing):
        def record(self, work: Any) -> Any:
            seen.append(gc.isenabled())
            return super().record(work)

    model = make(CPU)
    engine_on(model, Looking())
    for _ in range(WARM_UP + 1):
        run(model, batch(CPU))
    assert seen == [False, False]
    assert gc.isenabled()
