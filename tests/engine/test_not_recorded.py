"""What cannot be recorded runs as it is, and says why."""

from __future__ import annotations

import pytest
import torch

from pyralis.engine.recorders import Rerun
from pyralis.engine.step_graphs import WARM_UP, use_step_graphs
from pyralis.models.causal_lm import causal_lm_loss, causal_lm_of
from pyralis.models.fast_path import backbone_state
from pyralis.models.surgery import accelerate, restore
from pyralis.models.weights import LayerState
from tests.engine.steps import SIZES, batch, graphs, loss_of, make, run
from tests.tiny import build_tiny_variant


def test_what_is_not_recorded_says_why(device: torch.device) -> None:
    model = make(device)
    engine = graphs(model, device)
    inputs = batch(device)
    base = causal_lm_of(model)
    handle = base.model.norm.register_forward_hook(lambda *_: None)
    run(model, inputs)
    assert "hook" in str(engine.reason)
    handle.remove()
    rest = {"inputs_embeds": base.model.embed_tokens(inputs["input_ids"]), "attention_mask": inputs["attention_mask"]}
    causal_lm_loss(model, rest, inputs["labels"]).backward()
    assert "inputs_embeds" in str(engine.reason)
    assert use_step_graphs(model, "off") is None
    restore(model)
    assert use_step_graphs(model, recorder=Rerun()) is None


@pytest.mark.parametrize("variant", ["llama-dynamic-rope", "phi3-longrope"])
def test_rope_that_a_longer_row_changes(device: torch.device, variant: str) -> None:
    """A bucket's padding would: the step runs as it is."""
    model = build_tiny_variant(variant, **SIZES)
    accelerate(model)
    model.to(device).train()
    engine = graphs(model, device)
    inputs = batch(device)
    values = [run(model, inputs) for _ in range(WARM_UP + 1)]
    assert "longest position" in str(engine.reason)
    use_step_graphs(model, "off")
    assert values == [run(model, inputs)] * (WARM_UP + 1)


def test_deterministic_algorithms_have_steps_of_their_own() -> None:
    device = torch.device("cpu")
    model, inputs = make(device), batch(device)
    engine = graphs(model, device)
    for _ in range(WARM_UP + 1):
        run(model, inputs)
    assert engine.reason is None
    torch.use_deterministic_algorithms(True)
    try:
        run(model, inputs)
    finally:
        torch.use_deterministic_algorithms(False)
    assert engine.reason is not None


def test_layers_on_several_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    device = torch.device("cpu")
    model, inputs = make(device), batch(device)
    engine = graphs(model, device)
    run(model, inputs)
    of_layer = LayerState.device.fget
    last = backbone_state(causal_lm_of(model).model).kept.weights.layers[-1]
    monkeypatch.setattr(
        LayerState, "device", property(lambda self: torch.device("meta") if self is last.state else of_layer(self))
    )
    run(model, inputs)
    assert "several devices" in str(engine.reason)


def test_a_second_forward_before_the_backward(device: torch.device) -> None:
    model = make(device)
    engine = graphs(model, device)
    inputs = batch(device)
    for _ in range(WARM_UP + 1):
        run(model, inputs)
    first, second = loss_of(model, inputs), loss_of(model, inputs)
    assert "still to come" in str(engine.reason)
    (first + second).backward()
    with pytest.raises(RuntimeError, match="second time"):
        first.backward()
    del first, second
    run(model, inputs)
    assert engine.reason is None
