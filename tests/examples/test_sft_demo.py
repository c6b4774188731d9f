"""examples/sft_demo.py as it stands: on a tiny model in seconds, on SmolLM2 in the fuller tier."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path
from typing import Any

import pytest
from peft import PeftModel
from transformers import AutoModelForCausalLM

from pyralis.models.surgery import report
from tests.tiny import make_tiny_model

DEMO = Path(__file__).parents[2] / "examples" / "sft_demo.py"


def run(model: Path, steps: int, output: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setattr(sys, "argv", [str(DEMO), str(model), "--steps", str(steps), "--output", str(output)])
    return runpy.run_path(str(DEMO))["main"]()


def check(trainer: Any, steps: int, layers: int, model: Path, output: Path) -> None:
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert len(set(losses)) == steps
    assert all(0 < loss < 8 for loss in losses)
    assert report(trainer.model).fast_layers == layers
    assert trainer.loss_reason(trainer.model) is None
    assert PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(model), output).peft_config["default"].r == 16


def test_on_a_tiny_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = make_tiny_model(tmp_path / "model", max_position_embeddings=2048)
    trainer = run(folder, 3, tmp_path / "outputs", monkeypatch)
    check(trainer, 3, 2, folder, tmp_path / "outputs")


@pytest.mark.full
def test_on_smollm2(smollm2: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = run(smollm2, 2, tmp_path / "outputs", monkeypatch)
    check(trainer, 2, 30, smollm2, tmp_path / "outputs")
