"""Batches brought to one of few lengths, so that a captured step serves many: padding that nothing learns from.

Padding goes where it can be seen by no real token: on the right of full, right-padded and packed rows (a sequence of
its own there), on the left of left-padded ones, whose positions stay as they were.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from pyralis.models.detect import Reason
from pyralis.models.layout import READ, BatchShape, batch_layout
from pyralis.ops._loss import IGNORE_INDEX
from pyralis.ops._triton import cdiv, next_power_of_2
from pyralis.ops.attention_spec import AttentionLayout

GRAIN = 64  # tokens; below 512 every multiple is a bucket
BOUNDS_GRAIN = 32  # sequences of a packed batch


@dataclass(frozen=True, eq=False)
class Bucketed:
    """A batch at its bucket's length. `layout.cu_seqlens`, where there are any, are filled up to a bucket's number."""

    input_ids: Tensor  # [B, S]
    labels: Tensor  # [B, S], not shifted
    positions: Tensor | None  # [1 or B, S]
    layout: AttentionLayout

    @property
    def shape(self) -> tuple[int, ...]:
        """What a captured step is fixed to."""
        bounds, positions = self.layout.cu_seqlens, self.positions
        return (
            *self.input_ids.shape, self.layout.batch, self.layout.seq, self.layout.max_seqlen,
            -1 if bounds is None else bounds.numel(), -1 if positions is None else positions.shape[0],
        )  # fmt: skip


def bucket_length(tokens: int) -> int:
    """`tokens` rounded up: to a multiple of 64, above 512 to one of eight sizes an octave (at most 1/8 is padding)."""
    grain = max(GRAIN, next_power_of_2(tokens) // 16)
    return cdiv(tokens, grain) * grain


def to_bucket(input_ids: Tensor, labels: Tensor, arguments: Mapping[str, Any]) -> Bucketed | Reason:
    """The batch at its bucket's length; `arguments`: what else the decoder was called with, of which `READ` is looked
    at. A Reason where tokens lie in a way that the fast path does not understand."""
    rows, tokens = input_ids.shape
    shape = BatchShape(rows, tokens, input_ids.device)
    given = {name: arguments.get(name) for name in READ}
    layout = batch_layout(shape, given)
    if isinstance(layout, Reason):
        return layout
    if layout.shared is not None:
        return Reason("prompts that are computed once")
    extra = bucket_length(tokens) - tokens
    positions, mask = given["position_ids"], given["attention_mask"]
    left = layout.cu_seqlens is not None and mask is not None
    sides = (extra, 0) if left else (0, extra)
    if positions is not None:
        positions = pad(positions, sides) if left else _continued(positions, extra)
    if left:
        assert mask is not None
        if extra:
            if positions is None:
                positions = torch.arange(-extra, tokens, device=input_ids.device).clamp(min=0)[None]
            starts = (mask == 0).sum(1).to(input_ids.device) + extra
            layout = AttentionLayout.left_padded(starts, tokens + extra)
    elif layout.cu_seqlens is not None:
        if extra and rows > 1:
            return Reason(f"packed rows of {tokens} tokens: pad them to {tokens + extra}, or pack into one row")
        layout = _filled_up(layout, tokens + extra)
    else:
        layout = AttentionLayout.padded(rows, tokens + extra)
    return Bucketed(pad(input_ids, sides), pad(labels, sides, value=IGNORE_INDEX), positions, layout)


def _continued(positions: Tensor, extra: int) -> Tensor:
    """The padding's positions from 0, as a sequence of its own."""
    if not extra:
        return positions
    more = torch.arange(extra, device=positions.device, dtype=positions.dtype).expand(len(positions), -1)
    return torch.cat([positions, more], 1)


def _filled_up(layout: AttentionLayout, tokens: int) -> AttentionLayout:
    """A packed layout of one row of `tokens`, the padding a sequence, then empty ones up to a round number."""
    bounds = layout.cu_seqlens
    assert bounds is not None
    total = tokens if layout.tokens < tokens else layout.tokens
    room = cdiv(bounds.numel() + 1, BOUNDS_GRAIN) * BOUNDS_GRAIN - bounds.numel()
    longest = min(max(next_power_of_2(layout.max_seqlen), next_power_of_2(total - layout.tokens), 256), total)
    return AttentionLayout.packed(pad(bounds, (0, room), value=total), longest, total)
