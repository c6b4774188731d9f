"""What the fast path asks of whatever computes the layers: `fused.py`, and in tests a readable stand-in."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor, nn

from pyralis.models.policy import SavePolicy
from pyralis.models.spec import LayerSpec
from pyralis.ops.attention_spec import AttentionLayout


class Block(Protocol):
    """What computes layers. One object serves all models."""

    def prepare(self, layers: Sequence[tuple[nn.Module, LayerSpec]], kept: Any) -> Prepared:
        """What `run` needs of the layers as they are now. kept: the `Prepared.kept` of the call before, or None."""

    def look(self, layers: Sequence[tuple[nn.Module, LayerSpec]], kept: Any) -> Prepared:
        """The same without anything for the device to do: for a recorded step, in which `prepare` is recorded."""

    def release(self, kept: Any) -> None:
        """The layers go back to stock: their parameters are to be on their own again."""

    def run(
        self, handle: Any, hidden_states: Tensor, cos: Tensor, sin: Tensor, layout: AttentionLayout,
        *, policy: SavePolicy, tile: int | None = None,
    ) -> Tensor:  # fmt: skip
        """A layer's output [B, S, H]; policy: what to keep of it for the backward;
        tile: tokens that the MLP may take at a time."""


@dataclass(frozen=True, eq=False)
class Prepared:
    """handles: for each layer what `run` takes, or why it has to run stock. kept: for the next call, with the model."""

    handles: Sequence[Any]
    kept: Any = None
