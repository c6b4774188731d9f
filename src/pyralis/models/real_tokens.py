"""The real tokens of padded rows: when it pays to compute them alone, where they stand, tensors brought there and back.

Shapes: B rows of S tokens, T of which are real.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pyralis.ops.attention_spec import AttentionLayout

# Attention's time for a token that sees one more, over the time of everything else for a token, forward and backward:
# a layer of Llama-3-8B on an H100 at 2 x 2048, cuDNN over rows of one length (645 of 7,780 us) and FlashAttention over
# sequences of any (1,068 us). docs/performance.md has both.
OVER_ROWS, OVER_SEQUENCES = 4.4e-5, 7.3e-5
LEAST_GAIN = 0.02


def pays(layout: AttentionLayout) -> bool:
    """Whether padded rows are computed faster without their padding. False where the host does not know it.

    In short rows from 4 % of padding on. In long ones attention weighs more, and loses cuDNN: 15 % at 8,192 tokens.
    """
    if layout.lengths is None or not (total := sum(layout.lengths)):
        return False
    seq = layout.tokens // len(layout.lengths)
    sequences = total + OVER_SEQUENCES * sum(length * length for length in layout.lengths)
    if layout.cu_seqlens is None:
        rows = layout.tokens * (1 + OVER_ROWS * seq)
    else:  # padded on the left: the padding is a sequence of its own
        rows = layout.tokens + OVER_SEQUENCES * sum(n * n + (seq - n) ** 2 for n in layout.lengths)
    return sequences <= (1 - LEAST_GAIN) * rows


@dataclass(frozen=True, eq=False)
class RealTokens:
    """Where the T real tokens of [B, S] stand, row by row.

    index: [T] int64, in the flattened batch. layout: theirs, a sequence a row; a row without any is an empty one.
    """

    rows: int
    seq: int
    index: Tensor
    layout: AttentionLayout

    @classmethod
    def of(cls, padded: AttentionLayout, device: torch.device) -> RealTokens:
        """Of a layout that has `lengths`. They go to `device` in one copy that nothing waits for."""
        assert padded.lengths is not None
        lengths = np.asarray(padded.lengths, np.int64)
        rows, seq = len(lengths), padded.tokens // len(lengths)
        ends, starts = lengths.cumsum(), np.arange(rows, dtype=np.int64) * seq
        if padded.cu_seqlens is not None:  # on the left
            starts = starts + seq - lengths
        total = int(ends[-1])
        index = np.arange(total) + np.repeat(starts - (ends - lengths), lengths)
        both = on_device(np.concatenate([index, [0], ends]), device)
        bounds = both[total:].to(torch.int32)
        return cls(rows, seq, both[:total], AttentionLayout.packed(bounds, int(lengths.max()), total))

    def gathered(self, t: Tensor) -> Tensor:
        """[1, T, ...] of [B, S, ...], or of [1, S, ...] that stands for every row. Differentiable."""
        index = self.index if t.device == self.index.device else self.index.to(t.device)
        if t.shape[0] != self.rows:
            index = index % self.seq
        return t.reshape(-1, *t.shape[2:]).index_select(0, index)[None]

    def spread(self, t: Tensor) -> Tensor:
        """[B, S, ...] of [1, T, ...], zero in padded places. Differentiable."""
        padded = t.new_zeros(self.rows * self.seq, *t.shape[2:]).index_copy(0, self.index, t[0])
        return padded.view(self.rows, self.seq, *t.shape[2:])

    def among_real(self, places: Tensor) -> Tensor:
        """[N] places in the flattened batch -> places among the real tokens; of padding, some real token's."""
        index = self.index.to(places.device)
        table = index.new_zeros(self.rows * self.seq)
        return table.index_copy_(0, index, torch.arange(len(index), device=index.device)).index_select(0, places)


def on_device(numbers: NDArray[np.int64], device: torch.device) -> Tensor:
    """In one copy that the CPU does not wait for."""
    host = torch.from_numpy(numbers)
    return (host.pin_memory() if device.type == "cuda" else host).to(device, non_blocking=True)
