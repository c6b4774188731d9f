from __future__ import annotations

from pathlib import Path

import pytest
import torch

from pyralis.models import fingerprint as module
from pyralis.models.fingerprint import weights_fingerprint
from pyralis.models.load import ModelSettings, load_model
from tests.tiny import build_tiny_model, make_tiny_model


def test_any_weight_counts_and_so_does_its_place(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build_tiny_model()
    first = weights_fingerprint(model)
    assert weights_fingerprint(build_tiny_model()) == first
    monkeypatch.setattr(module, "WORDS", 7)
    assert weights_fingerprint(model) == first
    with torch.no_grad():
        weight = model.lm_head.weight
        weight[3, 5] += 1e-3
        changed = weights_fingerprint(model)
        weight[3, 5] -= 1e-3
        weight[:, [0, 2]] = weight[:, [2, 0]].clone()  # the same numbers elsewhere, a word apart
        swapped = weights_fingerprint(model)
    assert len({first, changed, swapped}) == 3
    assert weights_fingerprint(model, lambda name: "lm_head" not in name) == weights_fingerprint(
        build_tiny_model(), lambda name: "lm_head" not in name
    )
    assert weights_fingerprint(model.to(torch.bfloat16)) != swapped


def test_scales_of_four_bit_weights_count(tmp_path: Path) -> None:
    model = load_model(ModelSettings(str(make_tiny_model(tmp_path)), train_mode="qlora", dtype="float32")).model
    first = weights_fingerprint(model)
    state = model.model.layers[0].mlp.up_proj.weight.quant_state
    (state.state2 if state.nested else state).absmax[0] *= 1.01
    assert weights_fingerprint(model) != first
