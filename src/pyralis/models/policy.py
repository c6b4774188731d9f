"""What a layer keeps between its forward and its backward.

    keep               everything the backward reads, but h = act(gate) * up where `makes_product_again`
    recompute_cheap    norm outputs, h = act(gate) * up and, with q/k norms, the rotated q and k are computed anew
    recompute_layer    the layer's input, and h A^T of the down projection's LoRA, a row of its rank; all before h is
                       computed anew, and then held as under recompute_cheap
    offload_input      as recompute_layer, with the input in pinned host memory meanwhile

Neither h nor the down projection's output is computed again: the kernel that yields the gradients of gate and up makes
h in passing, and nothing reads the output but a norm behind it (Gemma 2 and 3), for which it is kept. Gradients are the
same for every policy. `memory/footprint.py` has the bytes.

Under the last two the MLP may run in tiles of tokens (`block_tiles.py`), forward and backward.
"""

from __future__ import annotations

from typing import Literal, Protocol, get_args

from torch import Tensor

from pyralis.ops.lora_group import LoraGroup
from pyralis.ops.lora_tiles import reads_dy_once

SavePolicy = Literal["keep", "recompute_cheap", "recompute_layer", "offload_input"]
POLICIES: tuple[SavePolicy, ...] = get_args(SavePolicy)
RECOMPUTING: tuple[SavePolicy, ...] = ("recompute_layer", "offload_input")


def makes_product_again(down: LoraGroup, trains_base: bool) -> bool:
    """Whether the backward makes the down projection's input again in passing, so that no policy keeps it.

    One kernel makes it with the gradients of gate and up, reads it for dA and writes it nowhere (`ops/glu_lora.py`):
    without it a layer keeps 28 KB a token less of Llama-3-8B. Where that kernel does not run, the one that does writes
    it, a fifth of its 250 us at T = 4096 on an H100. Trained weights read all of it, dropout its masked form, and above
    rank 32 products apart are better: there it is kept.
    """
    return not trains_base and not down.has_dropout and reads_dy_once(down.rank)


class InputStore(Protocol):
    """Where `offload_input` keeps layer inputs."""

    def put(self, tensor: Tensor) -> object:
        """Start moving `tensor` away, before the layer computes; returns what `get` takes."""
        ...

    def settle(self) -> None:
        """The layer has computed: what was put may be given up as soon as it has moved."""
        ...

    def get(self, handle: object) -> Tensor:
        """The tensor again, where it was, usable on the current stream."""
        ...
