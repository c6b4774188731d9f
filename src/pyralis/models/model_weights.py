"""The fused layers of one model: their weights, the flat buffer of their gradients, and dropout's counter."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from pyralis.errors import ModelError
from pyralis.models.gradients import FlatGradients
from pyralis.models.group_state import LayoutOptions
from pyralis.models.spec import LayerSpec
from pyralis.models.weights import LayerState, LayerWeights
from pyralis.models.workspace import Workspace
from pyralis.ops.dropout_mask import advance, new_rng


class ModelWeights:
    """The fused layers of one model: their workspace, the flat buffer of their gradients, and dropout's counter."""

    def __init__(
        self, layers: Sequence[tuple[nn.Module, LayerSpec]], *, options: LayoutOptions | None = None, seed: int = 0
    ) -> None:
        self.workspace = Workspace()
        self.layers = [
            LayerWeights(layer, spec, index=index, workspace=self.workspace, options=options)
            for index, (layer, spec) in enumerate(layers)
        ]
        self.seed = seed
        self._forget()

    def _forget(self) -> None:
        self._gradients: FlatGradients | None = None
        self._given = False
        self._states: list[LayerState | None] = []
        self._counter: Tensor | None = None
        self.rng: Tensor | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in ("workspace", "layers", "seed")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._forget()

    @property
    def parameters(self) -> tuple[nn.Parameter, ...]:
        """What is trained in the layers that are served, in the order in which flat buffers should have it."""
        return tuple(p for layer in self.layers if layer.served for p in layer.parameters)

    @property
    def gradients(self) -> FlatGradients:
        if self._gradients is None:
            self._gradients = FlatGradients(self.parameters)
        return self._gradients

    @property
    def take(self) -> Callable[[Tensor], None] | None:
        """Of `FlatGradients`."""
        return None if self._gradients is None else self._gradients.take

    def use_gradients(self, gradients: FlatGradients | None) -> None:
        """Write into another's flat buffer from now on, such as a flat optimizer's; None: into one of its own."""
        self._gradients, self._given = gradients, gradients is not None

    def before_replay(self, states: Sequence[LayerState]) -> None:
        """What a recorded step takes as given has to be there. states: the layers' when it was recorded."""
        for layer, state in zip(self.layers, states):
            layer.keep_matrices(state)

    def after_replay(self, *, failed: bool = False) -> None:
        """A recorded step has written to the workspace; failed: a recording that did not come about has not."""
        for layer in self.layers:
            layer.forget_matrices(resident=failed)

    def release(self) -> None:
        """Leave the modules as they would be without Pyralis: see `LayerWeights.release`."""
        for layer in self.layers:
            layer.release()

    def refresh(self, autocast: torch.dtype | None = None) -> list[str | None]:
        """At the start of each forward of the model: for each layer None, or why the fused block does not serve it now.

        autocast: autocast's dtype where it is on; plain weights of another are then multiplied in it, as stock does.
        Draws new dropout masks; a backward keeps those of its forward.
        """
        reasons = self.look(autocast)
        self.copy()
        return reasons

    def look(self, autocast: torch.dtype | None = None) -> list[str | None]:
        """The first half of `refresh`, on the host: what the modules hold. Before a recorded step, which has the second
        half in it."""
        reasons: list[str | None] = []
        with torch.no_grad():
            for layer in self.layers:
                try:
                    layer.look(autocast)
                except ModelError as error:
                    reasons.append(str(error))
                else:
                    reasons.append(None)
        states = [layer.state if layer.served else None for layer in self.layers]
        if states != self._states:
            self._states = states
            if self._gradients is not None and not self._given and not self._gradients.serves(self.parameters):
                self._gradients = None
        return reasons

    def copy(self) -> None:
        """The second half, on the device: the copies that the layers compute with."""
        targets: list[Tensor] = []
        sources: list[Tensor] = []
        with torch.no_grad():
            for layer in self.layers:
                if layer.served:
                    layer.collect(targets, sources)
            if targets:
                torch._foreach_copy_(targets, sources)
            self._draw()

    def _draw(self) -> None:
        if not any(layer.served and layer.state.has_dropout for layer in self.layers):
            self.rng = None
            return
        if self._counter is None:
            device = next(layer.state.device for layer in self.layers if layer.served)
            self._counter = new_rng(self.seed, device)
        self.rng = self._counter.clone()
        advance(self._counter)
