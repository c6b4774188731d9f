"""A run in which memory runs out is the run in which it does not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model

from pyralis.memory.auto import Planner, follow_plan, planner_of
from pyralis.models.causal_lm import causal_lm_of
from pyralis.models.checkpointing import save_policy
from pyralis.models.surgery import accelerate
from pyralis.train.sft_trainer import SFTTrainer
from pyralis.train.trainer import PyralisTrainer
from tests.memory.pretend import Full, pretended
from tests.tiny import build_tiny_model
from tests.train.sft_runs import build
from tests.train.test_lean import make


def trained(folder: Path, planner: Planner | None, **settings: Any) -> dict[str, torch.Tensor]:
    """The parameters after three steps of two micro-batches, with dropout."""
    torch.manual_seed(0)
    model: Any = build_tiny_model("llama")
    model = get_peft_model(model, LoraConfig(r=4, lora_dropout=0.2, target_modules="all-linear"))
    accelerate(model)
    if planner is not None:
        follow_plan(model.get_base_model(), planner)
    make(PyralisTrainer, folder, model, **settings).train()
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("accumulation", [1, 3])
def test_a_run_out_of_memory_is_the_same_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, accumulation: int
) -> None:
    expected = trained(tmp_path, None, gradient_accumulation_steps=accumulation)
    planner = Planner(look=pretended(1 << 40))
    full = Full(monkeypatch, {"recompute_layer", "offload_input"})
    found = trained(tmp_path, planner, gradient_accumulation_steps=accumulation)
    assert full.failures >= 2
    assert [record.message[:13] for record in caplog.records if record.levelname == "WARNING"].count(
        "Out of memory"
    ) == full.failures
    assert planner.settings.accumulation == accumulation
    for name, parameter in expected.items():
        assert torch.equal(found[name], parameter), name


@pytest.mark.parametrize(("checkpointing", "planned"), [(True, True), (False, False)])
def test_trl_s_checkpointing_is_the_plan(tmp_path: Path, checkpointing: bool, planned: bool) -> None:
    """Of a model that the trainer makes fast; one that is fast has been told by whoever made it so."""
    model = build_tiny_model("llama")
    trainer = build(SFTTrainer, tmp_path, model=model, settings={"gradient_checkpointing": checkpointing})
    assert (planner_of(causal_lm_of(trainer.model)) is not None) is planned


def test_offloaded_activations_take_the_place_of_the_plan(tmp_path: Path) -> None:
    trainer = build(SFTTrainer, tmp_path, settings={"activation_offloading": True})
    causal: Any = causal_lm_of(trainer.model)
    assert planner_of(causal) is None
    trainer.train()
    causal.train()
    assert {save_policy(layer) for layer in causal.model.layers} == {"offload_input"}
