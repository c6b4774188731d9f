"""The weight of a group of linear layers with the views of it that LoRA's products take.

A view costs 1 us of CPU, 5 on the H100 machine, and a step took 32 of them of weights that had not moved since the step
before. Shapes as in `lora_group.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from pyralis.ops.lora_group import LoraGroup


@dataclass(frozen=True, slots=True, eq=False)
class LoraWeight:
    """Views of `whole`: what is written there later is seen."""

    whole: Tensor  # [N, K], [N, K + P] with B beside W, or [N + P, K + P] with A below W as well
    across: Tensor  # [K or K + P, N]: what the forward multiplies by
    W: Tensor  # [N, K]
    down: Tensor | None  # [N + P, K]: W above A, where that is there
    B: tuple[Tensor | None, ...] | None  # of each projection, [N_j, r_j]; from beside W, or as given; None: not given

    @classmethod
    def of(cls, group: LoraGroup, weight: Tensor, B: Sequence[Tensor | None] | None = None) -> LoraWeight:
        """B: read where it does not lie beside W."""
        N, K = group.out_features, group.in_features
        rows, columns = weight.shape
        beside = weight[:, K:] if columns > K else None
        own = None if B is None else tuple(B)
        if beside is not None:
            parts = zip(group.projections, group.rows, group.columns)
            own = tuple(beside[r, c] if p.rank else None for p, r, c in parts)
        top = weight if rows == N else weight[:N]
        below = weight[:, :K] if rows > N else None
        return cls(weight, top.t(), top if columns == K else top[:, :K], below, own)

    def given_B(self, j: int) -> Tensor:
        assert self.B is not None, "a weight without LoRA columns needs B"
        matrix = self.B[j]
        assert matrix is not None, f"projection {j} has a rank but no B"
        return matrix
