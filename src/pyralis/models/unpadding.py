"""A call of the decoder with padded rows turned into one over the real tokens alone, and its results back.

Everything between embeddings and the last norm then sees one row of T tokens, whose sequences attention keeps apart:
the code of packed batches. Whoever looks from inside (hooks) would see other shapes, so with hooks that are not known
the padding is computed. Angles of RoPE are those of the padded call, gathered: some are scaled by the longest position.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.utils import ModelOutput

from pyralis.models.layer_state import HARMLESS_HOOKS, HOOKS
from pyralis.models.real_tokens import RealTokens, pays
from pyralis.models.spec import LayerSpec
from pyralis.models.swap import FAST_STATE
from pyralis.ops.attention import backend_for
from pyralis.ops.attention_choice import VARIABLE_LENGTHS
from pyralis.ops.attention_spec import AttentionLayout, AttentionSpec

# An argument of the decoder: a `Kept` of a caller that takes the last hidden states [1, T, H] as they are.
UNPADDED = "pyralis_unpadded"
# Hooks that only have the embeddings require a gradient, in transformers, TRL and PEFT.
_REQUIRE_GRADS = ("make_inputs_require_grad", "_require_grads_hook")


@dataclass(eq=False)
class Kept:
    """tokens: which ones the last hidden states are of; None: they are padded. Filled in by the decoder."""

    tokens: RealTokens | None = None


def find_real_tokens(backbone: Any, arguments: Mapping[str, Any], layout: AttentionLayout) -> RealTokens | None:
    """The tokens that a call of a decoder, all of whose layers are fast, is to compute; None: those it was given."""
    positions = arguments.get("position_ids")
    inputs = arguments.get("input_ids")
    inputs = arguments["inputs_embeds"] if inputs is None else inputs
    if positions is not None and (positions.dim() != 2 or positions.shape[1] != inputs.shape[1]):
        return None
    if any(arguments.get(name) is not None for name in ("cache_position", "seq_idx")):
        return None
    if not pays(layout) or not can_be_removed(backbone, layout, inputs.device):
        return None
    return RealTokens.of(layout, inputs.device)


def can_be_removed(backbone: Any, layout: AttentionLayout, device: torch.device) -> bool:
    """Whether nothing in a decoder would notice that the padding is gone, and its attention takes any lengths."""
    outside = (child for child in backbone.children() if child is not backbone.layers)
    # Hooks inside a layer have it run stock.
    if any(odd_hook(module) is not None for child in outside for module in child.modules()):
        return False
    if any(odd_hook(layer) is not None for layer in backbone.layers):
        return False
    embeddings = backbone.get_input_embeddings().weight
    if any(next(layer.parameters()).device != device for layer in (backbone.layers[0], backbone.layers[-1])):
        return False  # over several devices
    dtype = torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else embeddings.dtype
    bounds = torch.empty(2, dtype=torch.int32, device="meta")
    packed = AttentionLayout.packed(bounds, layout.max_seqlen, layout.tokens)
    return all(backend_for(spec, packed, dtype, device).name in VARIABLE_LENGTHS for spec in _attentions(backbone))


def without_padding(arguments: Mapping[str, Any], tokens: RealTokens) -> dict[str, Any]:
    """The arguments of the call over the real tokens. Positions stay: it is the angles that are gathered."""
    changed = dict(arguments)
    for name in ("input_ids", "inputs_embeds"):
        if (given := arguments.get(name)) is not None:
            changed[name] = tokens.gathered(given)
    if arguments.get("position_ids") is None:
        changed["position_ids"] = torch.arange(tokens.seq, device=tokens.index.device)[None]
    return changed


def padded_again(output: Any, tokens: RealTokens) -> Any:
    """What the decoder returned, in the shapes of the padded call; zeros stand in padded places."""
    if isinstance(output, Tensor):
        return tokens.spread(output)
    if isinstance(output, ModelOutput):
        return type(output)(**{name: padded_again(value, tokens) for name, value in output.items()})
    if isinstance(output, tuple):
        return tuple(padded_again(value, tokens) for value in output)
    return output


def _attentions(backbone: Any) -> set[AttentionSpec]:
    specs = (vars(layer)[FAST_STATE].spec for layer in backbone.layers)
    return {spec.attention for spec in specs if isinstance(spec, LayerSpec)}


def odd_hook(module: nn.Module) -> str | None:
    """The first hook of a module that could tell rows from sequences, or does something that is not known; accelerate's
    are in place of its `forward`."""
    own = vars(module)
    if "_hf_hook" in own:
        return type(own["_hf_hook"]).__qualname__
    for kind in HOOKS:
        for hook in own[kind].values():
            name = getattr(hook, "__qualname__", type(hook).__qualname__)
            is_known = getattr(hook, "__module__", None) in HARMLESS_HOOKS or any(n in name for n in _REQUIRE_GRADS)
            if not is_known:
                return str(name)
    return None
