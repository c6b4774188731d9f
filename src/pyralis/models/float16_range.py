"""What is said before training where hidden states may leave float16's range in layers that run stock."""

from __future__ import annotations

from typing import Any

import torch

from pyralis.models.detect import family_of
from pyralis.models.surgery import decoder_layers
from pyralis.models.wide_residual import outgrows_float16


def float16_warning(model: Any, fast_layers: int) -> str | None:
    """fast_layers: how many of its decoder layers are fast. None where there is nothing to say: other families, other
    dtypes, and models all of whose layers are fast, which keep the residual stream in float32."""
    layers = decoder_layers(model)
    if not layers or fast_layers == len(layers) or not outgrows_float16(layers[0]):
        return None
    if model.get_input_embeddings().weight.dtype != torch.float16:
        return None
    family = family_of(layers[0])
    assert family is not None
    return (
        f"float16: {family.name}'s hidden states leave its range (65,504), and layers that run stock keep them in it: "
        "the loss may become NaN. Layers that are all fast do not (acceleration: auto), nor does float32, nor bfloat16 "
        "on a GPU that has it."
    )
