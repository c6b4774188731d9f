"""What gradient checkpointing means for a model's fast layers: a `SavePolicy` for each of them.

transformers' switch (`gradient_checkpointing_enable`) says whether, the policy chosen here says how. Without a choice a
checkpointed layer is recomputed. A planned policy (`memory/auto.py`) holds whatever the switch says. Layers that run
stock have no policies: there the switch alone decides.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn

from pyralis.models.policy import POLICIES, SavePolicy
from pyralis.models.swap import is_checkpointed

CHOSEN = "_pyralis_save_policy"
PLANNED = "_pyralis_planned_policy"


def save_policy(layer: nn.Module) -> SavePolicy:
    """What a fast layer keeps in this call: everything, unless it is trained and checkpointed, or planned for."""
    planned: SavePolicy | None = vars(layer).get(PLANNED)
    if planned is not None:
        return planned if layer.training and torch.is_grad_enabled() else "keep"
    return vars(layer).get(CHOSEN, "recompute_layer") if is_checkpointed(layer) else "keep"


def choose_save_policy(layers: Iterable[nn.Module], policy: SavePolicy | None) -> None:
    """Let checkpointed layers follow `policy` from now on, copies of them too; None forgets an earlier choice."""
    if policy is not None and policy not in POLICIES:
        raise ValueError(f"the policy is {policy!r}; expected one of {', '.join(POLICIES)}")
    for layer in layers:
        _set(layer, CHOSEN, policy)


def plan_save_policy(layer: nn.Module, policy: SavePolicy | None) -> None:
    """Let a layer in training follow `policy`, above what was chosen; None: what was chosen holds again."""
    _set(layer, PLANNED, policy)


def _set(layer: nn.Module, name: str, policy: SavePolicy | None) -> None:
    vars(layer).pop(name, None)
    if policy is not None:
        vars(layer)[name] = policy
