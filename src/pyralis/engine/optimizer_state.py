"""Reading one parameter's AdamW states as other optimizers save them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pyralis.ops.adamw_8bit import BLOCK

_WRAPPED = "__bnb_optimizer_quant_state__"  # where bitsandbytes hides 8-bit states from FSDP


def unwrapped(state: dict[str, Any]) -> dict[str, Any]:
    """The state with bitsandbytes' nested entries beside the others."""
    return {**{key: value for key, value in state.items() if key != _WRAPPED}, **state.get(_WRAPPED, {})}


def read_moments(state: dict[str, Any], device: torch.device) -> tuple[Tensor, Tensor]:
    """(m, v), flat float32, of a state of torch's AdamW or bitsandbytes', whose maps it holds."""
    if "exp_avg" in state:
        m, v = state["exp_avg"], state["exp_avg_sq"]
    else:
        m, v = (_decoded(state, number) for number in (1, 2))
    return m.to(device, torch.float32).flatten(), v.to(device, torch.float32).flatten()


def _decoded(state: dict[str, Any], number: int) -> Tensor:
    codes: Tensor = state[f"state{number}"].flatten()
    if codes.dtype != torch.uint8:
        return codes
    scale = state[f"absmax{number}"].repeat_interleave(BLOCK)[: codes.numel()]
    values: Tensor = state[f"qmap{number}"][codes.int()] * scale
    return values
