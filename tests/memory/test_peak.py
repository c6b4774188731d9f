"""The predicted peak is what a forward and a backward really hold at once, kernels run under the interpreter.

The MLP is wide here, as in real models, so that the peak is in its backward and not in a CPU's attention.
"""

from __future__ import annotations

import gc
from typing import Any

import pytest
import torch
from peft import LoraConfig

from pyralis.memory.footprint import backward_per_token, computed_per_token, kept_per_token, tiled_bytes
from pyralis.models.checkpointing import choose_save_policy
from pyralis.models.policy import SavePolicy
from pyralis.models.surgery import decoder_layers
from pyralis.ops._triton import kernels_on_cpu
from tests.memory.live import LiveBytes
from tests.memory.test_footprint import LORA, build, describe

TOKENS, WIDE = 4, {"intermediate_size": 384}
BOUNDS = 64  # bytes: counters and other scalars


OUTPUT, ANGLES = 64 * 4, 2 * 16 * 4  # of a token


def peaks(base: Any, tokens: int) -> tuple[int, int]:
    """Bytes that a step holds at the most, (forward, backward)."""
    with kernels_on_cpu():
        base.model(inputs_embeds=torch.randn(1, tokens, 64))  # lays weights out
        base.zero_grad()
        gc.collect()
        with LiveBytes(watched=True) as live:
            x = torch.randn(1, tokens, 64, requires_grad=True)
            out = base.model(inputs_embeds=x).last_hidden_state
            forward, live.peak = live.peak, 0
            out.backward(torch.ones_like(out))
    return forward, live.peak


@pytest.mark.full
@pytest.mark.parametrize("policy", ["keep", "recompute_layer"])
def test_a_step_holds_what_is_predicted(policy: SavePolicy) -> None:
    base = build("llama", four_bit=True, **WIDE)
    layers = decoder_layers(base)
    choose_save_policy(layers, policy)
    layer = describe(base).layers[0]
    kept, computed = kept_per_token(layer, policy), computed_per_token(layer)
    forward, backward = peaks(base, TOKENS)
    at_most = kept + computed + ANGLES
    assert TOKENS * at_most <= forward <= TOKENS * (at_most + OUTPUT) + BOUNDS
    held = kept if policy == "keep" else computed - OUTPUT
    expected = kept + held + backward_per_token(layer) + ANGLES + OUTPUT  # `out` is still held here
    assert TOKENS * expected <= backward <= TOKENS * expected + BOUNDS


@pytest.mark.full
@pytest.mark.parametrize(("lora", "tokens", "tile"), [(LORA, 6, 3), (LORA, 7, 4), (None, 7, 3)])
def test_an_mlp_in_tiles_holds_what_is_predicted(lora: LoraConfig | None, tokens: int, tile: int) -> None:
    """The MLP is wider still, so that a tile of it takes more than attention's backward."""
    base = build("llama", four_bit=lora is not None, lora=lora, intermediate_size=768)
    layers = decoder_layers(base)
    choose_save_policy(layers, "recompute_layer", tile)
    layer = describe(base).layers[0]
    kept, tiled = kept_per_token(layer, "recompute_layer"), tiled_bytes(layer, tokens, tile)
    forward, backward = peaks(base, tokens)
    expected = tokens * (kept + ANGLES) + tiled.forward
    assert expected <= forward <= expected + BOUNDS
    expected = tokens * (kept + ANGLES + OUTPUT) + tiled.backward  # `out` is still held here
    assert expected <= backward <= expected + BOUNDS
    whole = computed_per_token(layer) - OUTPUT + backward_per_token(layer)
    assert tiled.backward < tokens * whole
