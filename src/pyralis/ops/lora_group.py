"""What is said about linear layers with LoRA that share their input, and how their matrices are laid out.

    y_j = x W_j^T + b_j + s_j (dropout_j(x) A_j^T B_j^T + lora_bias_j)          for each projection j

q, k and v (or gate and up, or one projection alone) are stacked along the output features:

    weight  [N + P, K + P]             [[W | B], [A | -]]: W [N, K] stacked; B [N, P] block-diagonal: rows of
                                       projection j x its own columns; A [P, K], the A_j stacked, without their scales
    x_wide  [T, K + P] = [x | xa]      xa = s x A^T, the columns of projection j filled from its own dropout
    dy_wide [T, N + P] = [dy | t]      t = s dy B

so that y = x_wide @ [W | B]^T is one GEMM, and dx = dy_wide @ [[W], [A]] another. Rows and columns after the R used are
zero: a product with them adds nothing. Either half may be missing. `concatenates` says where B beside W pays; without
it the same functions multiply by each B_j on its own. Without A's rows t A is added to dx.

Shapes: T tokens, K input features, N output features of all projections, R ranks of all projections, P >= R columns.
Source of the maths: Hu et al., LoRA (2021), equation 3; Kalajdzievski, rsLoRA (2023) for s = alpha / sqrt(r).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate

import torch
from torch import Tensor

from pyralis.ops._triton import Gpu, cdiv
from pyralis.ops.dropout_mask import LEVELS

COLUMNS = 64  # rows of wide matrices are whole multiples: 128-byte rows of bf16, no remainder in the GEMM's K loop
MAX_RANK = 256


@dataclass(frozen=True, slots=True)
class LoraProjection:
    """One linear layer. `rank` 0: it has no adapter. `dropout`: PEFT's `lora_dropout`, with a mask of its own."""

    out_features: int
    rank: int = 0
    scale: float = 1.0
    dropout: float = 0.0

    def __post_init__(self) -> None:
        if self.out_features < 1:
            raise ValueError(f"out_features must be at least 1, got {self.out_features}")
        if not 0 <= self.rank <= MAX_RANK:
            raise ValueError(f"the LoRA rank must be in 0..{MAX_RANK}, got {self.rank}")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"the LoRA dropout must be in [0, 1), got {self.dropout}")

    @property
    def threshold(self) -> int:
        """Of `LEVELS` equally likely values, those below it drop an element."""
        return min(round(self.dropout * LEVELS), LEVELS - 1) if self.rank else 0

    @property
    def keep_scale(self) -> float:
        """What kept elements are multiplied by: the inverse of the rate at which they are kept, exactly."""
        return LEVELS / (LEVELS - self.threshold)


@dataclass(frozen=True, slots=True)
class Run:
    """Neighbouring adapters alike in rank, scale and dropout: one launch serves them all."""

    first: int  # index among the projections that have adapters
    count: int
    column: int  # their first column
    like: LoraProjection

    @property
    def columns(self) -> slice:
        return slice(self.column, self.column + self.count * self.like.rank)

    @property
    def alpha(self) -> float:
        """What LoRA's product is multiplied by while dropout is on: s / (1 - p)."""
        return self.like.scale * self.like.keep_scale

    def part(self, first: int, most: int) -> Run:
        """At most `most` of the adapters, from the first-th on."""
        count = min(most, self.count - first)
        return Run(self.first + first, count, self.column + first * self.like.rank, self.like)


@dataclass(frozen=True)
class LoraGroup:
    """Projections that share their input. `dora`: every adapter has a magnitude vector (`dora.py`).

    What follows from the fields is computed once: a layer asks for it some fifty times a step.
    """

    in_features: int
    projections: tuple[LoraProjection, ...]
    dora: bool = False

    @cached_property
    def out_features(self) -> int:
        return sum(p.out_features for p in self.projections)

    @cached_property
    def rank(self) -> int:
        """R: the ranks of all projections together."""
        return sum(p.rank for p in self.projections)

    @cached_property
    def pad(self) -> int:
        """P: LoRA columns of wide matrices, R and then zeros, so that whole rows are multiples of `COLUMNS`."""
        return cdiv(self.in_features + self.rank, COLUMNS) * COLUMNS - self.in_features if self.rank else 0

    @cached_property
    def width(self) -> int:
        """K + P."""
        return self.in_features + self.pad

    @cached_property
    def height(self) -> int:
        """N + P."""
        return self.out_features + self.pad

    @cached_property
    def has_dropout(self) -> bool:
        return any(p.threshold for p in self.projections)

    @cached_property
    def rows(self) -> tuple[slice, ...]:
        """Where each projection's output features lie among N."""
        return _slices([p.out_features for p in self.projections])

    @cached_property
    def columns(self) -> tuple[slice, ...]:
        """Where each projection's rank lies among P."""
        return _slices([p.rank for p in self.projections])

    @cached_property
    def adapted(self) -> tuple[int, ...]:
        """The projections that have adapters."""
        return tuple(j for j, p in enumerate(self.projections) if p.rank)

    @cached_property
    def runs(self) -> tuple[Run, ...]:
        found: list[Run] = []
        for index, j in enumerate(self.adapted):
            projection, last = self.projections[j], found[-1] if found else None
            alike = last is not None and (last.like.rank, last.like.scale, last.like.threshold) == (
                projection.rank, projection.scale, projection.threshold
            )  # fmt: skip
            if last is not None and alike:
                found[-1] = Run(last.first, last.count + 1, last.column, last.like)
            else:
                found.append(Run(index, 1, self.columns[j].start, projection))
        return tuple(found)


def _slices(sizes: Sequence[int]) -> tuple[slice, ...]:
    ends = list(accumulate(sizes))
    return tuple(slice(end - size, end) for end, size in zip(ends, sizes))


def stack_A(group: LoraGroup, A: Sequence[Tensor | None], out: Tensor) -> Tensor:
    """Write the A_j [r_j, K] one under another into out [P, K], cast; rows after them become zero."""
    for j in group.adapted:
        source = A[j]
        assert source is not None
        out[group.columns[j]].copy_(source)
    out[group.rank :].zero_()
    return out


def stack_B(group: LoraGroup, B: Sequence[Tensor | None], out: Tensor) -> Tensor:
    """Write the B_j [N_j, r_j] block-diagonally into out [N, P] (weight[:, K:], say), cast; all else becomes zero."""
    out.zero_()
    for j in group.adapted:
        source = B[j]
        assert source is not None
        out[group.rows[j], group.columns[j]].copy_(source)
    return out


def combine_bias(
    group: LoraGroup, bias: Sequence[Tensor | None], lora_bias: Sequence[Tensor | None], dtype: torch.dtype
) -> Tensor | None:
    """b_j + s_j lora_bias_j of all projections as one vector [N], summed in float32; None if there are none."""
    present = [b for b in (*bias, *lora_bias) if b is not None]
    if not present:
        return None
    wide = torch.promote_types(present[0].dtype, torch.float32)
    total = torch.zeros(group.out_features, dtype=wide, device=present[0].device)
    for j, projection in enumerate(group.projections):
        for b, factor in ((bias[j], 1.0), (lora_bias[j], projection.scale)):
            if b is not None:
                total[group.rows[j]].add_(b, alpha=factor)
    return total.to(dtype)


# Matmul FLOP per byte of memory traffic that each GPU class sustains in half precision: the H100's is measured
# (690-780 TFLOP/s over 3.0 TB/s), the others are datasheet ratios times the same efficiency, to be measured.
FLOPS_PER_BYTE = {(6, 1): 20, (7, 0): 100, (7, 5): 100, (8, 0): 140, (8, 6): 90, (8, 9): 150, (9, 0): 240}
LAUNCH_BYTES = 6_000_000  # what memory moves in the 2 us of one more launch


def concatenates(group: LoraGroup, tokens: int, gpu: Gpu, element_size: int = 2) -> bool:
    """Whether [W | B] in one GEMM beats multiplying by each B_j after the base GEMM.

    Concatenated, the P columns cost 2 T N P operations more in the forward, zero blocks included. Apart, y is read and
    written once more, at about 0.62 of copy bandwidth (`addmm_` onto [4096, 28672] took 252 us on an H100), by a launch
    for each projection. Applied once, when weights are laid out, with the tokens of a usual micro-batch.
    """
    if not group.rank:
        return False
    rate = FLOPS_PER_BYTE[max(c for c in FLOPS_PER_BYTE if c <= max(gpu.capability, (6, 1)))]
    adapted_features = sum(group.projections[j].out_features for j in group.adapted)
    together = 2 * tokens * group.out_features * group.pad / rate
    apart = 2 * tokens * adapted_features * element_size / 0.62 + len(group.adapted) * LAUNCH_BYTES
    return together <= apart
