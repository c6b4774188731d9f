"""The memory that a run on a GPU is predicted to take, before its first step."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from datasets import Dataset

from pyralis.data.store import longest_sequence
from pyralis.errors import ModelError
from pyralis.memory.auto import Device, autocast_on, look_at, planner_of
from pyralis.memory.cost import Batch
from pyralis.memory.plan import Plan, fixed_plan
from pyralis.memory.predict import Settings
from pyralis.memory.shape import describe_model
from pyralis.models.causal_lm import causal_lm_of
from pyralis.models.policy import SavePolicy
from pyralis.models.surgery import decoder_layers
from pyralis.ops._triton import gpu_of
from pyralis.train.config.train_config import TrainConfig
from pyralis.train.plan_run import largest_batch, moment_bytes


@dataclass(frozen=True, slots=True)
class Prediction:
    """plan: None where there is none, and `reason` says why; None without a GPU."""

    plan: Plan | None = None
    reason: str | None = None


def predict_memory(
    config: TrainConfig, model: Any, rows: Any, *, look: Callable[[torch.device], Device | None] = look_at
) -> Prediction:
    """For the largest micro-batch that a config may make of `rows`. To be called under the autocast of the training.

    model: as it is trained, adapters attached. look: at a GPU, where the model follows no plan of its own.
    """
    causal: Any = causal_lm_of(model)
    device = next(causal.parameters()).device
    planner = planner_of(causal)
    seen = (look if planner is None else planner.look)(device)
    if seen is None:
        return Prediction()
    if config.deepspeed or config.fsdp:
        return Prediction(reason=f"{'deepspeed' if config.deepspeed else 'fsdp'} spreads the model over GPUs")
    longest = longest_sequence(rows) if isinstance(rows, Dataset) else None
    batch = Batch(*largest_batch(config, longest))
    moments = moment_bytes(config, causal.dtype)
    settings = Settings(moments, config.gradient_accumulation_steps, recorded=config.cuda_graph == "auto")
    if planner is not None:
        return Prediction(*planner.foresee(causal, batch, settings))
    try:
        shape = describe_model(causal, decoder_layers(causal), gpu_of(device), autocast=autocast_on(device))
    except ModelError as error:
        return Prediction(reason=str(error))
    policy: SavePolicy = "keep" if config.gradient_checkpointing is False else "recompute_layer"
    return Prediction(fixed_plan(shape, batch, policy, seen.rates, settings, budget=seen.usable))


def plan_of(model: Any, predicted: Prediction) -> Plan | None:
    """The plan that a run ended with: the one that its model follows, else the predicted one."""
    planner = planner_of(causal_lm_of(model))
    return predicted.plan if planner is None or planner.plan is None else planner.plan
