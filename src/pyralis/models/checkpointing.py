"""What gradient checkpointing means for a model's fast layers: one `SavePolicy` for each model.

transformers' switch (`gradient_checkpointing_enable`) says whether, the policy chosen here says how. Without a choice a
checkpointed layer is recomputed. Layers that run stock have no policies: there the switch alone decides.
"""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn

from pyralis.models.policy import POLICIES, SavePolicy
from pyralis.models.swap import is_checkpointed

CHOSEN = "_pyralis_save_policy"


def save_policy(layer: nn.Module) -> SavePolicy:
    """What a fast layer keeps in this call: everything, unless checkpointing is on and the layer is trained."""
    return vars(layer).get(CHOSEN, "recompute_layer") if is_checkpointed(layer) else "keep"


def choose_save_policy(layers: Iterable[nn.Module], policy: SavePolicy | None) -> None:
    """Let checkpointed layers follow `policy` from now on, copies of them too; None forgets an earlier choice."""
    if policy is not None and policy not in POLICIES:
        raise ValueError(f"the policy is {policy!r}; expected one of {', '.join(POLICIES)}")
    for layer in layers:
        vars(layer).pop(CHOSEN, None)
        if policy is not None:
            vars(layer)[CHOSEN] = policy
