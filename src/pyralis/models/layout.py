"""How the tokens of a batch lie, from what a model was called with, as stock transformers reads it:

- a 2-D mask tells the padding; positions then are only positions;
- without a mask, positions that do not go up by one start a new sequence (packing);
- anything else (4-D masks, holes in a mask) is not understood, and the model runs stock.

On a GPU, looking at a mask waits for it once a batch, as stock does, and one look tells how long each row is, too.
Whoever knows says it and nothing waits: `padding_side` and `sequence_lengths` for padded rows, `sequence_lengths` or
`cu_seq_lens_q` and `max_length_q` for packed ones. What is said is believed. With the side alone nothing waits either,
but on a GPU the padding is then computed: how much of it there is would have to be read.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pyralis.errors import ModelError
from pyralis.models.detect import Reason
from pyralis.models.real_tokens import on_device
from pyralis.ops.attention_spec import AttentionLayout, SharedKeys

PADDING_SIDES = ("right", "left")
# Packed sequences in which keys stand twice: {"rows", "first", "again"} of `SharedKeys`, beside `cu_seq_lens_q` and the
# keys' `cu_seq_lens_k`. Stock attention has no word for it.
SHARED_KEYS = "shared_keys"
# Numbers on the host: the real tokens of each row, beside a mask and `padding_side`; the tokens of each sequence of a
# packed batch, row by row, beside its positions.
LENGTHS = "sequence_lengths"
# The arguments read here. A stock model would hand those of `HINTS` on to its attention function.
HINTS = ("padding_side", LENGTHS, SHARED_KEYS)
READ = ("attention_mask", "position_ids", "cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k", *HINTS)


@dataclass(frozen=True)
class BatchShape:
    rows: int
    tokens: int  # of a row
    device: torch.device


def batch_layout(shape: BatchShape, arguments: Mapping[str, Any]) -> AttentionLayout | Reason:
    """The layout of a batch; `arguments`: those of `READ` that the model was called with."""
    mask, positions = arguments.get("attention_mask"), arguments.get("position_ids")
    bounds, side = arguments.get("cu_seq_lens_q"), arguments.get("padding_side")
    if side is not None and side not in PADDING_SIDES:
        raise ValueError(f"padding_side is {side!r}; expected 'right' or 'left'")
    if mask is not None:
        if not isinstance(mask, Tensor) or mask.dim() != 2:
            return Reason("an attention mask of its own making")
        if tuple(mask.shape) != (shape.rows, shape.tokens):
            return Reason(f"a mask of {list(mask.shape)} for {shape.rows} rows of {shape.tokens} tokens")
        return _padded(shape, mask, side, arguments.get(LENGTHS))
    if positions is None:
        return AttentionLayout.padded(shape.rows, shape.tokens) if bounds is None else Reason("cu_seq_lens alone")
    if positions.dim() != 2 or positions.shape[-1] != shape.tokens or positions.shape[0] not in (1, shape.rows):
        return Reason(f"positions of shape {list(positions.shape)}")
    if bounds is not None:
        found = _given(shape, bounds, arguments.get("max_length_q"))
        shared = arguments.get(SHARED_KEYS)
        return found if shared is None or isinstance(found, Reason) else _shared(shape, found, shared, arguments)
    said = arguments.get(LENGTHS)
    return _packed(shape, _lengths_by(shape, positions) if said is None else _said(said, shape.rows * shape.tokens))


def _padded(shape: BatchShape, mask: Tensor, side: str | None, said: Any) -> AttentionLayout | Reason:
    lengths: tuple[int, ...] | None = None
    if side is None:
        kept = mask != 0
        right, left = kept[:, 1:] <= kept[:, :-1], kept[:, 1:] >= kept[:, :-1]
        is_right, is_left, *counts = torch.cat([torch.stack([right.all(), left.all()]).long(), kept.sum(1)]).tolist()
        side, lengths = "right" if is_right else "left" if is_left else None, tuple(counts)
    elif said is not None:
        lengths = _said(said)
        if len(lengths) != shape.rows or not all(0 <= length <= shape.tokens for length in lengths):
            raise ValueError(
                f"{LENGTHS} is {list(lengths)}; expected the number of real tokens of each of {shape.rows} rows of "
                f"{shape.tokens}"
            )
    elif mask.device.type == "cpu":  # nothing waits
        lengths = tuple((mask != 0).sum(1).tolist())
    if side == "right":  # causal attention lets no real token see what stands after it
        return AttentionLayout.padded(shape.rows, shape.tokens, lengths)
    if side == "left":
        starts = (mask == 0).sum(1).to(shape.device)
        return AttentionLayout.left_padded(starts, shape.tokens, lengths)
    return Reason("a mask with padding on both sides, or with holes")


def _said(said: Any, total: int | None = None) -> tuple[int, ...]:
    lengths = tuple(int(length) for length in (said.tolist() if isinstance(said, Tensor) else said))
    if total is not None and (sum(lengths) != total or min(lengths) < 1):
        raise ValueError(
            f"{LENGTHS} is {list(lengths)}; expected those of the sequences of a packed batch, {total} tokens in all"
        )
    return lengths


def _given(shape: BatchShape, bounds: Tensor, longest: Any) -> AttentionLayout | Reason:
    if shape.rows != 1 or bounds.dim() != 1:
        return Reason("cu_seq_lens for more than one row")
    total = shape.rows * shape.tokens
    return AttentionLayout.packed(bounds.to(shape.device, torch.int32), int(longest or total), total)


def _shared(
    shape: BatchShape, packed: AttentionLayout, shared: Mapping[str, Tensor], arguments: Mapping[str, Any]
) -> AttentionLayout:
    assert packed.cu_seqlens is not None
    ends = arguments["cu_seq_lens_k"].to(shape.device, torch.int32)
    keys = SharedKeys(ends, **{name: shared[name].to(shape.device) for name in ("rows", "first", "again")})
    longest = int(arguments.get("max_length_k") or len(keys.rows))
    return AttentionLayout.shared_prompts(packed.cu_seqlens, keys, longest, packed.tokens)


def refuse_shared_keys(arguments: Mapping[str, Any], reason: str) -> None:
    """Stock attention would take such a batch for something else: never a wrong answer.

    Raises:
        ModelError: shared keys are given.
    """
    if arguments.get(SHARED_KEYS) is not None:
        raise ModelError(
            f"a batch whose prompts are computed once needs every layer on the fast path, but {reason}. Give each "
            "answer its own prompt (share_prompts: false)."
        )


def _lengths_by(shape: BatchShape, positions: Tensor) -> tuple[int, ...]:
    """Of sequences that begin where positions do not go up by one. One row of positions stands for all rows."""
    starts = torch.ones(positions.shape, dtype=torch.bool, device=positions.device)
    starts[:, 1:] = positions.diff(dim=1) != 1
    first = starts.expand(shape.rows, -1).flatten().nonzero().flatten().tolist()
    return tuple(end - start for start, end in pairwise([*first, shape.rows * shape.tokens]))


def _packed(shape: BatchShape, lengths: tuple[int, ...]) -> AttentionLayout:
    if lengths == (shape.tokens,) * shape.rows:
        return AttentionLayout.padded(shape.rows, shape.tokens)
    bounds = on_device(np.concatenate([[0], np.cumsum(lengths)]), shape.device).to(torch.int32)
    return AttentionLayout.packed(bounds, max(lengths), shape.rows * shape.tokens)
