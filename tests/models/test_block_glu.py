"""The fused block's MLP with the GLU and LoRA's sums in one kernel, which alone is interpreted, in bfloat16."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from peft import LoraConfig

from pyralis.models import block_glu
from pyralis.models.group_state import LayoutOptions
from pyralis.models.policy import POLICIES
from pyralis.ops._triton import kernels_on_cpu
from tests.models.block_harness import ALL, DORA, Batch, Fused, Result, build, make_batch, relative_error, truth_of
from tests.models.test_block import set_dropout
from tests.ops.harness import interpreted

pytestmark = interpreted
SUBSET = replace(ALL, target_modules=["q_proj", "up_proj", "down_proj"])
RANKS = replace(ALL, rank_pattern={"down_proj": 4})
BF16 = torch.bfloat16


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[tuple[bool, bool]]:
    """Of each call of the one kernel: whether it made t and dB of gate and up, and dA of down."""
    calls: list[tuple[bool, bool]] = []
    for name in ("supported", "glu_lora_backward", "glu_lora_forward"):
        original = getattr(block_glu, name)

        def interpreted_alone(*inputs: Any, original: Any = original, name: str = name, **named: Any) -> Any:
            if name == "glu_lora_backward":
                calls.append((named["lora"] is not None, named["down"] is not None))
            with kernels_on_cpu():
                return original(*inputs, **named)

        monkeypatch.setattr(block_glu, name, interpreted_alone)
    return calls


def half_model(family: str, lora: LoraConfig | None) -> Any:
    """In bfloat16 with float32 adapters."""
    model = build(family, lora).to(BF16)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = parameter.data.float()
    return model


def apart(fused: Fused, batch: Batch, monkeypatch: pytest.MonkeyPatch) -> Result:
    """By the ops one after another, with the same draw of dropout."""
    fused.model.zero_grad()
    with monkeypatch.context() as patch:
        patch.setattr(block_glu, "FUSES", False)
        return fused.run(batch, dtype=BF16, refresh=False)


@pytest.mark.parametrize(
    ("family", "lora", "expected"),
    [("llama", ALL, (True, True)), ("phi3", ALL, (True, True)), ("gemma2", ALL, (True, True)),
     ("qwen2", SUBSET, (True, True)), ("llama", DORA, (False, True)), ("llama", RANKS, None), ("llama", None, None)],
    ids=["llama", "one matrix", "four norms", "subset", "DoRA", "ranks", "full fine-tuning"],
)  # fmt: skip
@pytest.mark.parametrize("concatenate", [True, False])
def test_as_exact_as_apart(
    family: str, lora: LoraConfig | None, expected: tuple[bool, bool] | None, concatenate: bool,
    made: list[tuple[bool, bool]], monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    model, batch = half_model(family, lora), make_batch("full")
    truth, fused = truth_of(model, batch), Fused(model, options=LayoutOptions(concatenate=concatenate))
    got = fused.run(batch, dtype=BF16)
    assert made == ([] if expected is None else [expected] * 2)
    twice = fused.run(batch, dtype=BF16).grads
    other = apart(fused, batch, monkeypatch)
    assert got.grads.keys() == other.grads.keys() == truth.grads.keys()
    for name, true in truth.grads.items():
        error, allowed = relative_error(got.grads[name], true), relative_error(other.grads[name], true)
        assert error <= 1.1 * allowed + 1e-4, name
        assert relative_error(1.01 * got.grads[name], other.grads[name]) > 5e-3, name
        assert relative_error(got.grads[name], other.grads[name]) < 3e-3, name
        assert relative_error(twice[name], 2 * got.grads[name]) < 4e-3, name
    assert torch.equal(got.y, other.y) or relative_error(got.y, other.y) < 2e-3


def test_policies_yield_the_same_bits(made: list[tuple[bool, bool]]) -> None:
    fused, batch, results = Fused(half_model("llama", ALL)), make_batch("full"), []
    for policy in POLICIES:
        fused.model.zero_grad()
        results.append(fused.run(batch, policy, dtype=BF16))
    assert made == [(True, True)] * 2 * len(POLICIES)
    for other in results[1:]:
        assert torch.equal(results[0].y, other.y)
        assert torch.equal(results[0].dx, other.dx)
        assert all(torch.equal(grad, other.grads[name]) for name, grad in results[0].grads.items())


@pytest.mark.parametrize(
    ("change", "expected"),
    [("dropout", []), ("frozen A", [(True, False)] * 2), ("frozen B", []), ("trained weight", [(True, False)] * 2)],
)
def test_what_is_not_fused(
    change: str, expected: list[tuple[bool, bool]], made: list[tuple[bool, bool]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Gradients are those of the ops apart, whichever of them the kernel can make."""
    model, batch = half_model("llama", ALL), make_batch("full")
    if change == "dropout":
        set_dropout(model, 0.25)
    for name, parameter in model.named_parameters():
        parts = {"frozen A": "down_proj.lora_A", "frozen B": "up_proj.lora_B"}
        if change in parts and parts[change] in name:
            parameter.requires_grad_(False)
        if change == "trained weight" and "down_proj.base_layer" in name:
            parameter.requires_grad_(True)
    fused = Fused(model)
    fused.weights.refresh()
    got, other = fused.run(batch, dtype=BF16, refresh=False), apart(fused, batch, monkeypatch)
    assert made == expected
    assert got.grads.keys() == other.grads.keys()
    for name, grad in other.grads.items():
        assert relative_error(got.grads[name], grad) < 3e-3, name
