"""How long a layer's dequantised (or cast) matrices are there. All choices give the same numbers.

Usually a layer's four are made at once, for each forward and each backward, in memory that all layers share. Kept
between uses they cost memory of their own, 0.41 GiB a layer of Llama-3-8B, and save two launches a step. Made one after
another, each in the place of the one before, all layers together need 0.22 GiB in place of 0.41; a layer that is
recomputed then makes all but the down projection's a third time.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal, TypeAlias

from torch import nn

CHOSEN = "_pyralis_matrices"

Residency: TypeAlias = Literal["kept", "at once", "in turn"]


def residency(layer: nn.Module) -> Residency:
    chosen: Residency = vars(layer).get(CHOSEN, "at once")
    return chosen


def choose_residency(layers: Iterable[nn.Module], choice: Residency) -> None:
    """From the next call on; copies of the layers follow the same choice. Layers of which some make their matrices at
    once and others in turn have memory for both."""
    for layer in layers:
        vars(layer).pop(CHOSEN, None)
        if choice != "at once":
            vars(layer)[CHOSEN] = choice


def keep_matrices(layers: Iterable[nn.Module], keep: bool) -> None:
    """Keep them between uses, or make them at once for each."""
    choose_residency(layers, "kept" if keep else "at once")
