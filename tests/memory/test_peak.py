"""The predicted peaks are what a forward and a backward really hold at once, kernels run under the interpreter.

Attention itself runs as a CPU does it, which holds other things than a GPU's kernels: there the look is taken when it
has returned, and the float32 sums of dq that a GPU's kernel holds are left out of the prediction.
"""

from __future__ import annotations

import gc
from typing import Any

import pytest
import torch

from pyralis.memory.footprint import kept_per_token
from pyralis.memory.peaks import Peaks, peaks
from pyralis.models import block_backward, block_forward
from pyralis.models.checkpointing import choose_save_policy
from pyralis.models.policy import SavePolicy
from pyralis.models.surgery import decoder_layers
from pyralis.ops._triton import kernels_on_cpu
from tests.memory.live import LiveBytes
from tests.memory.test_footprint import build, describe

BOUNDS = 64  # bytes: counters and other scalars
MLP, ATTENTION = {"intermediate_size": 384}, {"intermediate_size": 64}  # which of the two holds the most


def angles(base: Any, tokens: int) -> int:
    """Bytes of RoPE's tables."""
    kinds = 2 if base.config.model_type == "gemma3_text" else 1
    return kinds * 2 * tokens * base.model.layers[0].self_attn.head_dim * 4


def measured(base: Any, tokens: int, monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype = torch.float32) -> Peaks:
    """Bytes that a forward and a backward hold at the most, input and output included."""
    with kernels_on_cpu():
        base.model(inputs_embeds=torch.randn(1, tokens, 64, dtype=dtype))  # lays weights out
        base.zero_grad()
        gc.collect()
        with LiveBytes(watched=True) as live, monkeypatch.context() as patch:
            for module, name in ((block_forward, "attention_forward"), (block_backward, "attention_backward")):
                patch.setattr(module, name, apart(getattr(module, name), live))
            x = torch.randn(1, tokens, 64, requires_grad=True, dtype=dtype)
            out = base.model(inputs_embeds=x).last_hidden_state
            forward, live.peak = live.peak, 0
            out.backward(torch.ones_like(out))
    return Peaks(forward, live.peak)


def apart(function: Any, live: LiveBytes) -> Any:
    """The same, looked at when it has returned."""

    def looked_at_after(*args: Any, **kwargs: Any) -> Any:
        with live.paused():
            result = function(*args, **kwargs)
        live.look()
        return result

    return looked_at_after


def expected(base: Any, tokens: int, policy: SavePolicy, tile: int | None = None) -> Peaks:
    """Of two layers alike: the last one's forward and backward; beside them the first one keeps its own, and `measured`
    holds RoPE's tables and the model's output."""
    layer = describe(base).layers[1]
    most = peaks(layer, policy, tokens, tile)
    around = tokens * kept_per_token(layer, policy) + angles(base, tokens)
    if policy == "offload_input":  # on a CPU inputs stay where they are
        around += tokens * 64 * layer.residual_size
    output = tokens * 64 * layer.residual_size
    if base.config.model_type == "granite":  # stock multiplies the embeddings
        around += output
    return Peaks(around + most.forward, around + most.backward + output)


CASES = [
    ("llama", "keep", MLP, None, 4),
    ("llama", "recompute_cheap", ATTENTION, None, 4),
    ("llama", "recompute_layer", MLP, None, 4),
    ("qwen3", "offload_input", ATTENTION, None, 4),
    ("granite", "recompute_layer", MLP, None, 4),
    ("phi3", "keep", ATTENTION, None, 4),
    ("llama", "offload_input", {"intermediate_size": 768}, 3, 7),
    ("qwen3", "recompute_layer", ATTENTION, 3, 6),
]


@pytest.mark.full
@pytest.mark.parametrize(("family", "policy", "sizes", "tile", "tokens"), CASES)
def test_a_step_holds_what_is_predicted(
    family: str, policy: SavePolicy, sizes: dict[str, int], tile: int | None, tokens: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr("pyralis.memory.peaks.DQ_SUMS", 0)
    base = build(family, four_bit=True, **sizes)
    choose_save_policy(decoder_layers(base), policy, tile)
    found, wanted = measured(base, tokens, monkeypatch), expected(base, tokens, policy, tile)
    assert wanted.backward <= found.backward <= wanted.backward + BOUNDS
    assert wanted.forward <= found.forward <= 1.01 * wanted.forward + BOUNDS


@pytest.mark.full
def test_tiles_of_full_fine_tuning(monkeypatch: pytest.MonkeyPatch) -> None:
    base = build("llama", lora=None, intermediate_size=768)
    choose_save_policy(decoder_layers(base), "recompute_layer", 3)
    found, wanted = measured(base, 7, monkeypatch), expected(base, 7, "recompute_layer", 3)
    assert wanted.backward <= found.backward <= wanted.backward + BOUNDS
    whole = expected(base, 7, "recompute_layer")
    assert wanted.backward < whole.backward
