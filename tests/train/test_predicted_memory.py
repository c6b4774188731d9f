"""Memory predicted before the first step: of the model's own plan, of fixed policies, and why there is none."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model

from pyralis.memory.auto import Planner, follow_plan, planner_of
from pyralis.models.surgery import accelerate
from pyralis.train.config.train_config import TrainConfig
from pyralis.train.predicted_memory import plan_of, predict_memory
from tests.memory.pretend import pretended
from tests.tiny import build_tiny_model

ROWS = Dataset.from_dict({"input_ids": [[1] * 5, [1] * 48], "length": [5, 48]})


def config(**fields: Any) -> TrainConfig:
    return TrainConfig(
        model_name_or_path="m", train_file="x.jsonl", output_dir="out", per_device_train_batch_size=4,
        max_seq_length=64, **fields,
    )  # fmt: skip


def tuned(**settings: Any) -> Any:
    model = get_peft_model(build_tiny_model(), LoraConfig(r=8, target_modules="all-linear", **settings))
    accelerate(model)
    return model.train()


def test_without_a_gpu_nothing_is_predicted() -> None:
    predicted = predict_memory(config(), tuned(), ROWS)
    assert (predicted.plan, predicted.reason) == (None, None)


def test_a_model_with_a_plan_foresees_it_and_follows_nothing_yet() -> None:
    model = tuned()
    planner = follow_plan(model.get_base_model(), Planner(look=pretended(1 << 34)))
    predicted = predict_memory(config(), model, ROWS)
    assert predicted.plan is not None
    assert (predicted.plan.batch.rows, predicted.plan.batch.length) == (4, 48)  # the longest row
    assert predicted.plan.fits
    assert planner.plan is None
    assert planner.settings.accumulation == 1
    assert plan_of(model, predicted) is predicted.plan
    planner.plan = predicted.plan
    assert plan_of(model, predicted) is planner.plan


@pytest.mark.parametrize(("field", "policy"), [(False, "keep"), ("full", "recompute_layer")])
def test_fixed_policies(field: Any, policy: str) -> None:
    model = tuned()
    predicted = predict_memory(config(gradient_checkpointing=field), model, (), look=pretended(1 << 34))
    assert predicted.plan is not None
    assert set(predicted.plan.policies) == {policy}
    assert predicted.plan.batch.length == 64  # of a stream the longest row is not known
    assert planner_of(model.get_base_model()) is None


def test_packed_rows_are_full() -> None:
    predicted = predict_memory(config(packing=True), tuned(), ROWS, look=pretended(1 << 34))
    assert predicted.plan is not None
    assert predicted.plan.batch.length == 64


def test_a_stock_layer_is_named() -> None:
    model = tuned()
    model.get_base_model().model.layers[1].mlp.register_forward_hook(lambda *_: None)
    predicted = predict_memory(config(), model, ROWS, look=pretended(1 << 34))
    assert predicted.plan is None
    assert predicted.reason is not None
    assert "layer 1 runs stock" in predicted.reason
    follow_plan(model.get_base_model(), Planner(look=pretended(1 << 34)))
    assert "layer 1 runs stock" in (predict_memory(config(), model, ROWS).reason or "")
    assert planner_of(model.get_base_model()).reason is None  # type: ignore[union-attr]


def test_optimizer_states_are_counted() -> None:
    model = tuned()
    small, large = (
        predict_memory(config(optim=optim), model, ROWS, look=pretended(1 << 34)).plan
        for optim in ("adamw_bnb_8bit", "adamw_torch")
    )
    assert small is not None
    assert large is not None
    assert small.memory.standing.optimizer < large.memory.standing.optimizer
    assert torch.is_grad_enabled()
