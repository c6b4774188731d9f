"""Whether a model can compute the prompt of two answers once (`AttentionLayout.shared_prompts`)."""

from __future__ import annotations

import torch
from torch import nn

from pyralis.models.layer_state import layer_state
from pyralis.models.spec import LayerSpec
from pyralis.models.surgery import decoder_layers, report
from pyralis.ops.attention import backend_for
from pyralis.ops.attention_choice import VARIABLE_LENGTHS
from pyralis.ops.attention_spec import AttentionLayout, AttentionSpec, SharedKeys


def sharing_reason(model: nn.Module, dtype: torch.dtype | None = None) -> str | None:
    """Why prompts have to be computed twice; None if they need not be.

    dtype: that of the compute, by default the weights'. On a GPU the attention kernel is tried once.
    """
    found = report(model)
    if not found.layers or found.fast_layers < len(found.layers):
        return "; ".join(found.lines)
    weight = model.get_input_embeddings().weight  # type: ignore[operator]
    for spec in _attentions(model):
        backend = backend_for(spec, _layout(weight.device), dtype or weight.dtype, weight.device).name
        if backend not in VARIABLE_LENGTHS:
            return f"the attention that serves this model here ({backend}) would hold all scores of shared prompts"
    return None


def _attentions(model: nn.Module) -> set[AttentionSpec]:
    specs = (layer_state(layer).spec for layer in decoder_layers(model))
    return {spec.attention for spec in specs if isinstance(spec, LayerSpec)}


def _layout(device: torch.device) -> AttentionLayout:
    """A prompt of one token with answers of one; as long as any, so that no window is taken for none."""
    bounds = torch.tensor([0, 2, 4], dtype=torch.int32, device=device)
    keys = SharedKeys(bounds, *(torch.tensor(t, device=device) for t in ([0, 1, 0, 2], [0, 1, 3], [[0], [2]])))
    return AttentionLayout.shared_prompts(bounds, keys, 1 << 30, 3)
