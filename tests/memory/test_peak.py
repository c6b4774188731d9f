"""The predicted peak is what a forward and a backward really hold at once, kernels run under the interpreter.

The MLP is wide here, as in real models, so that the peak is in its backward and not in a CPU's attention.
"""

from __future__ import annotations

import gc

import pytest
import torch

from pyralis.memory.footprint import backward_per_token, computed_per_token, kept_per_token
from pyralis.models.checkpointing import choose_save_policy
from pyralis.models.policy import SavePolicy
from pyralis.models.surgery import decoder_layers
from pyralis.ops._triton import kernels_on_cpu
from tests.memory.live import LiveBytes
from tests.memory.test_footprint import build, describe

TOKENS, WIDE = 4, {"intermediate_size": 384}
BOUNDS = 64  # bytes: counters and other scalars


@pytest.mark.full
@pytest.mark.parametrize("policy", ["keep", "recompute_layer"])
def test_a_step_holds_what_is_predicted(policy: SavePolicy) -> None:
    base = build("llama", four_bit=True, **WIDE)
    layers = decoder_layers(base)
    choose_save_policy(layers, policy)
    layer = describe(base).layers[0]
    kept, computed = kept_per_token(layer, policy), computed_per_token(layer)
    output, angles = 64 * 4, 2 * 16 * 4
    with kernels_on_cpu():
        base.model(inputs_embeds=torch.randn(1, TOKENS, 64))  # lays weights out
        base.zero_grad()
        gc.collect()
        with LiveBytes(watched=True) as live:
            x = torch.randn(1, TOKENS, 64, requires_grad=True)
            out = base.model(inputs_embeds=x).last_hidden_state
            forward, live.peak = live.peak, 0
            out.backward(torch.ones_like(out))
    at_most = kept + computed + angles
    assert TOKENS * at_most <= forward <= TOKENS * (at_most + output) + BOUNDS
    held = kept if policy == "keep" else computed - output
    expected = kept + held + backward_per_token(layer) + angles + output  # `out` is still held here
    assert TOKENS * expected <= live.peak <= TOKENS * expected + BOUNDS
