"""Batches brought to one of few lengths, so that a captured step serves many: padding that nothing learns from.

Padding goes where it can be seen by no real token: on the right of full and right-padded rows, on the left of
left-padded ones, whose positions stay as they were. Packed batches become one row, in which it is a sequence of its
own; so do padded ones without their padding, where the host knows their lengths and that is less to compute.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from pyralis.models.detect import Reason
from pyralis.models.layout import READ, BatchShape, batch_layout
from pyralis.models.real_tokens import RealTokens, pays
from pyralis.ops._head import bucket
from pyralis.ops._loss import IGNORE_INDEX
from pyralis.ops._triton import cdiv, next_power_of_2
from pyralis.ops.attention_spec import AttentionLayout

GRAIN = 64  # tokens; below 512 every multiple is a bucket
# Of a packed row. A kernel's blocks beyond a sequence's end return at once, but some thousands of them take their time.
LEAST_BOUNDS, LEAST_LONGEST = 16, 512


@dataclass(frozen=True, eq=False)
class Bucketed:
    """A batch at its bucket's length. `layout.cu_seqlens`, where there are any, are filled up to a bucket's number."""

    input_ids: Tensor  # [B, S]
    targets: Tensor  # [B, S]: what each position is to predict
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


def bucket_length(tokens: int, sizes: int = 8) -> int:
    """`tokens` rounded up: to a multiple of 64, above 64 * `sizes` to one of `sizes` an octave (1/`sizes` is padding at
    most)."""
    grain = max(GRAIN, next_power_of_2(tokens) // (2 * sizes))
    return cdiv(tokens, grain) * grain


def row_length(tokens: int) -> int:
    """The bucket of one packed row. All of its padding is computed, so there are more of them: 3 % of it on average."""
    return bucket_length(tokens, 16)


def bucket_rows(rows: int | None, tokens: int) -> int | None:
    """Of `tokens` rows, how many reach the head where `rows` are learnt: one of five shares, for few recorded steps."""
    if rows is None:
        return None
    return bucket(next((cdiv(tokens * share, 8) for share in (1, 2, 4, 6) if rows * 8 <= tokens * share), tokens))


def to_bucket(
    input_ids: Tensor,
    targets: Tensor,
    arguments: Mapping[str, Any],
    *,
    removable: Callable[[AttentionLayout], bool] | None = None,
) -> Bucketed | Reason:
    """The batch at its bucket's length; a Reason where tokens lie in a way that the fast path does not understand.

    arguments: what else the decoder was called with, of which `READ` is looked at. removable: whether the decoder may
    be given a packed layout in place of padded rows; None: no.
    """
    rows, tokens = input_ids.shape
    given = {name: arguments.get(name) for name in READ}
    layout = batch_layout(BatchShape(rows, tokens, input_ids.device), given)
    if isinstance(layout, Reason):
        return layout
    if layout.shared is not None:
        return Reason("prompts that are computed once")
    positions, mask = given["position_ids"], given["attention_mask"]
    if positions is not None and (positions.dim() != 2 or positions.shape[1] != tokens):
        return Reason(f"positions of shape {list(positions.shape)}")
    if removable is not None and _is_less(layout):
        real = RealTokens.of(layout, input_ids.device)
        at = torch.arange(tokens, device=input_ids.device)[None] if positions is None else positions
        ids, wanted, at = (real.gathered(t) for t in (input_ids, targets, at))
        packed = _one_row(ids, wanted, at, real.layout)
        if removable(packed.layout):
            return packed
    extra = bucket_length(tokens) - tokens
    if layout.cu_seqlens is None:
        layout = AttentionLayout.padded(rows, tokens + extra)
        positions = None if positions is None else _continued(positions, extra)
        return Bucketed(pad(input_ids, (0, extra)), _unlearnt(targets, (0, extra)), positions, layout)
    if mask is not None:
        starts = (mask == 0).sum(1).to(input_ids.device) + extra
        return Bucketed(
            pad(input_ids, (extra, 0)), _unlearnt(targets, (extra, 0)),
            pad(positions, (extra, 0)) if positions is not None else _from_zero(extra, tokens, input_ids.device),
            AttentionLayout.left_padded(starts, tokens + extra),
        )  # fmt: skip
    assert positions is not None  # they, or bounds beside them, told the sequences
    input_ids, targets, positions = (t.reshape(1, -1) for t in (input_ids, targets, positions.expand(rows, -1)))
    return _one_row(input_ids, targets, positions, layout)


def _is_less(padded: AttentionLayout) -> bool:
    """Whether there is less to compute without the padding, in buckets as well."""
    if padded.lengths is None or not pays(padded):
        return False
    rows = len(padded.lengths)
    return row_length(sum(padded.lengths)) < rows * bucket_length(padded.tokens // rows)


def _one_row(input_ids: Tensor, targets: Tensor, positions: Tensor, layout: AttentionLayout) -> Bucketed:
    """Of packed sequences, [1, T] each: the padding a sequence, then empty ones up to a power of two of bounds."""
    bounds, tokens = layout.cu_seqlens, layout.tokens
    assert bounds is not None
    extra = row_length(tokens) - tokens
    room = max(next_power_of_2(bounds.numel() + 1), LEAST_BOUNDS) - bounds.numel()
    longest = max(next_power_of_2(max(layout.max_seqlen, extra)), LEAST_LONGEST)
    layout = AttentionLayout.packed(pad(bounds, (0, room), value=tokens + extra), longest, tokens + extra)
    return Bucketed(
        pad(input_ids, (0, extra)), _unlearnt(targets, (0, extra)), _continued(positions, extra), layout
    )  # fmt: skip


def _unlearnt(targets: Tensor, sides: tuple[int, int]) -> Tensor:
    return pad(targets, sides, value=IGNORE_INDEX)


def _from_zero(extra: int, tokens: int, device: torch.device) -> Tensor | None:
    """The positions of rows as they were, padded on the left."""
    return torch.arange(-extra, tokens, device=device).clamp(min=0)[None] if extra else None


def _continued(positions: Tensor, extra: int) -> Tensor:
    """The padding's positions from 0, as a sequence of its own."""
    if not extra:
        return positions
    more = torch.arange(extra, device=positions.device, dtype=positions.dtype).expand(len(positions), -1)
    return torch.cat([positions, more], 1)
