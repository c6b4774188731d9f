"""AdamW's states over a flat buffer: made, seen as one parameter's, and read as other optimizers save them."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor

from pyralis.engine.flat_parameters import FlatLayout
from pyralis.engine.paged import paged_zeros
from pyralis.errors import ModelError
from pyralis.ops.adamw import State32bit
from pyralis.ops.adamw_8bit import BLOCK, State8bit

Moments = State32bit | State8bit

_WRAPPED = "__bnb_optimizer_quant_state__"  # where bitsandbytes hides 8-bit states from FSDP


def new_moments(layout: FlatLayout, bits: int, wide: Collection[int], *, paged: bool = False) -> Moments:
    """States of zero. wide: the numbers of the parameters that keep 32 bits. paged: in managed memory on a GPU."""
    n, device, allocate = layout.values.numel(), layout.values.device, paged_zeros if paged else torch.zeros
    if bits == 32:
        return State32bit.zeros(n, device, allocate=allocate)
    blocks = torch.zeros(layout.blocks, dtype=torch.bool)
    for i in wide:
        blocks[layout.block_part(i)] = True
    return State8bit.zeros(n, device, blocks, allocate=allocate)


def moments_of(moments: Moments, layout: FlatLayout, i: int, shape: torch.Size) -> dict[str, Tensor]:
    """Views of parameter i's states, under the names of torch's AdamW or of bitsandbytes'."""
    part, blocks = layout.part(i), layout.block_part(i)
    if isinstance(moments, State32bit):
        return {"exp_avg": moments.m[part].view(shape), "exp_avg_sq": moments.v[part].view(shape)}
    slot = -1 if moments.slots is None else int(moments.slots[blocks.start])
    if slot >= 0:
        assert moments.m is not None
        assert moments.v is not None
        kept = slice(slot * BLOCK, slot * BLOCK + layout.sizes[i])
        return {"state1": moments.m[kept].view(shape), "state2": moments.v[kept].view(shape)}
    return {
        "state1": moments.m_codes[part].view(shape), "state2": moments.v_codes[part].view(shape),
        "absmax1": moments.m_scale[blocks], "absmax2": moments.v_scale[blocks],
        "qmap1": moments.tables[:256], "qmap2": moments.tables[256:512],
    }  # fmt: skip


@torch.no_grad()
def load_moments(moments: Moments, layout: FlatLayout, own: list[dict[str, Any]], saved: list[dict[str, Any]]) -> None:
    """Take over what other optimizers, or this one, saved: `saved`, one state a parameter; empty ones become zeros.

    own: the states as `moments_of` gives them, with `low_bits` where there are any. One parameter at a time, since
    float32 copies of all 8-bit states need not fit. Raises ModelError for states of another size.
    """
    device = layout.values.device
    for i, (state, current) in enumerate(zip(saved, own)):
        size, part, blocks = layout.sizes[i], layout.part(i), layout.block_part(i)
        if state and state["exp_avg" if "exp_avg" in state else "state1"].numel() != size:
            raise ModelError(f"parameter {i} has {size} elements, but not in the checkpoint")
        if "absmax1" in state and "absmax1" in current:  # code by code
            for name in ("state1", "state2", "absmax1", "absmax2"):
                current[name].copy_(state[name].view(current[name].shape))
        else:
            m, v = read_moments(state, device) if state else (torch.zeros(size, device=device) for _ in range(2))
            keep = torch.zeros(blocks.stop - blocks.start, dtype=torch.bool, device=device)
            moments.part(part, blocks).store(m, v, keep)
        if "low_bits" in current:
            low = state.get("low_bits")
            current["low_bits"].zero_() if low is None else current["low_bits"].copy_(low)


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
