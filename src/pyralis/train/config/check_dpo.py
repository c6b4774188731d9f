"""What a config says of preferences: the fields, and how they must fit together."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from pyralis.train.config.findings import Finding, note

if TYPE_CHECKING:
    from pyralis.train.config.train_config import TrainConfig

DPO_FIELDS = ("beta", "max_prompt_length", "loss_type", "label_smoothing", "rpo_alpha", "precompute_ref_log_probs")
"""Of no use to other tasks."""


def dpo_rule(config: TrainConfig) -> Iterator[Finding]:
    smoothing, loss = config.label_smoothing, config.loss_type
    if smoothing and loss not in ("cdpo", "robust", "exo_pair", "aot", "aot_unpaired"):
        yield note("label_smoothing", message=f"label_smoothing: has no effect on {loss}; loss_type: cdpo has it.")
    if smoothing >= 0.5 and loss in ("cdpo", "robust"):
        yield Finding(
            ("label_smoothing", "loss_type"),
            f"label_smoothing: {smoothing} is not allowed with loss_type: {loss}; expected less than 0.5.",
        )
    if loss == "exo_pair" and not smoothing:
        yield Finding(("label_smoothing", "loss_type"), "loss_type: exo_pair needs label_smoothing, such as 1e-3.")
    if config.on_overlong == "split":
        yield Finding(
            ("on_overlong", "task_type"),
            "on_overlong: split does not go with task_type: dpo, which compares whole answers; use truncate or drop.",
        )
