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
CHOSEN_TILE, PLANNED_TILE = "_pyralis_mlp_tile", "_pyralis_planned_mlp_tile"


def save_policy(layer: nn.Module) -> SavePolicy:
    """What a fast layer keeps in this call: everything, unless it is trained and checkpointed, or planned for."""
    planned: SavePolicy | None = vars(layer).get(PLANNED)
    if planned is not None:
        return planned if layer.training and torch.is_grad_enabled() else "keep"
    return vars(layer).get(CHOSEN, "recompute_layer") if is_checkpointed(layer) else "keep"


def mlp_tile(layer: nn.Module) -> int | None:
    """Tokens that the MLP of a fast layer takes at a time where `save_policy` has it recomputed; None: all."""
    return vars(layer).get(PLANNED_TILE if PLANNED in vars(layer) else CHOSEN_TILE)


def choose_save_policy(layers: Iterable[nn.Module], policy: SavePolicy | None, tile: int | None = None) -> None:
    """Let checkpointed layers follow `policy` from now on, copies of them too; None forgets an earlier choice.

    tile: tokens that the MLP takes at a time under policies that recompute, for contexts too long for it at once.
    """
    if tile is not None and tile < 1:
        raise ValueError(f"the tile of the MLP is {tile} tokens; expected at least 1, or None for all at once")
    if policy is not None and policy not in POLICIES:
        raise ValueError(f"the policy is {policy!r}; expected one of {', '.join(POLICIES)}")
    for layer in layers:
        _set(layer, CHOSEN, policy)
        _set(layer, CHOSEN_TILE, tile)


def plan_save_policy(layer: nn.Module, policy: SavePolicy | None, tile: int | None = None) -> None:
    """Let a layer in training follow `policy` and `tile`, above what was chosen; None: what was chosen holds again."""
    _set(layer, PLANNED, policy)
    _set(layer, PLANNED_TILE, tile)


def _set(layer: nn.Module, name: str, value: SavePolicy | int | None) -> None:
    vars(layer).pop(name, None)
    if value is not None:
        vars(layer)[name] = value
