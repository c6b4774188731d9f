"""LoRA's orthogonal start on quantised layers, where PEFT casts it to the weights' integer dtype and fails.

With the rows of a random orthogonal matrix [r, r] in turn in P and Q, each [r / 2, r],

    A = (X P)^T / 10      X [K, r / 2] normal
    B = Y^T Q / 10        Y [r / 2, N] normal

so that B A = Y^T (Q P^T) X^T / 100 = 0: the model starts as it is, and neither factor is zero. Source of the maths:
Datta, Rethinking LoRA initialisations (2024), as in PEFT.
"""

from __future__ import annotations

from typing import Any

import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from torch import Tensor

from pyralis.errors import ModelError


def start_orthogonally(model: PeftModel, name: str = "default") -> None:
    """Give the adapter `name` this start. Raises ModelError where a rank is odd."""
    for path, layer in model.named_modules():
        if isinstance(layer, LoraLayer) and name in layer.lora_A:
            rank: int = layer.r[name]
            if rank % 2:
                raise ModelError(
                    f"init_lora_weights is 'orthogonal' and the rank of {path} is {rank}: take an even one."
                )
            _start(layer.lora_A[name], layer.lora_B[name], rank)


@torch.no_grad()
def _start(A: Any, B: Any, rank: int) -> None:
    rows, _ = torch.linalg.qr(torch.randn(rank, rank))

    def factor(features: int, half: Tensor) -> Tensor:
        return torch.randn(features, rank // 2) @ half / 10

    A.weight.copy_(factor(A.in_features, rows[0::2]).T)
    B.weight.copy_(factor(B.out_features, rows[1::2]))
