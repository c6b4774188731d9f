"""What a layer keeps between its forward and its backward.

    keep               everything the backward reads
    recompute_cheap    norm outputs, h = act(gate) * up and, with q/k norms, the rotated q and k are computed anew
    recompute_layer    the layer's input alone; all but the down projection is computed anew
    offload_input      as recompute_layer, with the input in pinned host memory meanwhile

The down projection's output is never computed again: nothing reads it but a norm behind it (Gemma 2 and 3), for which
it is kept. Gradients are the same for every policy. `memory/footprint.py` has the bytes.

Under the last two the MLP may run in tiles of tokens (`block_tiles.py`), forward and backward.
"""

from __future__ import annotations

from typing import Literal, Protocol, get_args

from torch import Tensor

SavePolicy = Literal["keep", "recompute_cheap", "recompute_layer", "offload_input"]
POLICIES: tuple[SavePolicy, ...] = get_args(SavePolicy)
RECOMPUTING: tuple[SavePolicy, ...] = ("recompute_layer", "offload_input")


class InputStore(Protocol):
    """Where `offload_input` keeps layer inputs."""

    def put(self, tensor: Tensor) -> object:
        """Start moving `tensor` away; returns what `get` takes."""
        ...

    def get(self, handle: object) -> Tensor:
        """The tensor again, where it was, usable on the current stream."""
        ...
