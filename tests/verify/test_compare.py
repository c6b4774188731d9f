"""Which errors pass, and what is named where they do not."""

from __future__ import annotations

import math

import pytest
import torch

from pyralis.verify.compare import Comparison, compare, component_of
from pyralis.verify.measure import Outcome

NAMES = [f"model.layers.{layer}.mlp.up_proj.lora_{kind}.default.weight" for layer in range(2) for kind in "AB"]


def outcome(error: float = 0.0, *, seed: int = 0, loss_error: float = 0.0, **errors: float) -> Outcome:
    """Relative errors of everything, and of single gradients: `first=`, `second=` ... in the order of NAMES."""
    exact, noise = torch.Generator().manual_seed(0), torch.Generator().manual_seed(seed + 1)

    def off(size: float) -> torch.Tensor:
        true, direction = (torch.randn(400, generator=g, dtype=torch.float64) for g in (exact, noise))
        return true + size * direction / direction.norm() * true.norm()

    words = ("first", "second", "third", "fourth")
    gradients = {name: off(errors.get(word, error)) for word, name in zip(words, NAMES)}
    return Outcome(4.0 * (1 + loss_error), off(error), gradients)


def judged(stock: Outcome, fast: Outcome, dtype: torch.dtype = torch.bfloat16) -> Comparison:
    return compare("right", outcome(), [stock], fast, dtype)


def test_as_good_as_stock_passes() -> None:
    found = judged(outcome(0.01), outcome(0.014, seed=1))
    assert found.passed
    assert [c.name for c in found.components] == ["loss", "token losses", "up_proj.lora_A", "up_proj.lora_B"]
    assert [round(c.fast, 3) for c in found.components[1:]] == [0.014] * 3


def test_worse_than_one_and_a_half_times_stock_fails() -> None:
    found = judged(outcome(0.01), outcome(0.016))
    assert not found.passed
    assert {failure.name for failure in found.failures} >= {"token losses"}


def test_a_single_tensor_is_named() -> None:
    found = judged(outcome(0.01), outcome(0.01, third=0.04))
    assert [failure.name for failure in found.failures] == [NAMES[2]]
    assert found.failures[0].fast == pytest.approx(0.04, rel=0.01)


@pytest.mark.parametrize(("dtype", "floor"), [(torch.float32, 1e-5), (torch.bfloat16, 1e-4)])
def test_errors_below_the_floor_pass(dtype: torch.dtype, floor: float) -> None:
    assert judged(outcome(), outcome(0.9 * floor), dtype).passed
    assert not judged(outcome(), outcome(0.9 * floor, second=1.1 * floor), dtype).passed


def test_the_loss_may_be_off_by_what_rounding_does_to_its_tokens() -> None:
    """1 % of each of 400 tokens' losses: 1 % / sqrt(400) of the mean, three times that is allowed."""
    size = outcome().token_losses.square().mean().sqrt().item() / 4.0
    limit = judged(outcome(0.01), outcome(0.01)).components[0].limit
    assert limit == pytest.approx(3 * 0.01 / math.sqrt(400) * size)
    assert not judged(outcome(0.01), outcome(0.01, loss_error=1.01 * limit)).passed


def test_nan_and_missing_gradients_fail() -> None:
    fast = outcome(0.01)
    fast.gradients[NAMES[3]][7] = math.nan
    assert [failure.name for failure in judged(outcome(0.01), fast).failures] == [NAMES[3]]
    del fast.gradients[NAMES[3]]
    assert [failure.name for failure in judged(outcome(0.01), fast).failures] == [NAMES[3]]
    fast.gradients[NAMES[3]] = outcome().gradients[NAMES[3]]
    fast.gradients["more"] = torch.ones(3)
    assert [failure.name for failure in judged(outcome(0.01), fast).failures] == ["more"]


def test_the_largest_error_of_several_stock_runs_counts() -> None:
    fast = outcome(0.05)
    assert not compare("right", outcome(), [outcome(0.01)], fast, torch.bfloat16).passed
    assert compare("right", outcome(), [outcome(0.01), outcome(0.04, seed=2)], fast, torch.bfloat16).passed


@pytest.mark.parametrize(
    ("name", "component"),
    [
        ("base_model.model.model.layers.3.self_attn.q_proj.lora_A.default.weight", "q_proj.lora_A"),
        ("base_model.model.model.layers.3.self_attn.q_proj.lora_B.other.bias", "q_proj.lora_B.bias"),
        ("base_model.model.model.layers.3.self_attn.q_proj.lora_magnitude_vector.default.weight",
         "q_proj.lora_magnitude_vector"),
        ("base_model.model.model.layers.3.self_attn.q_proj.base_layer.bias", "q_proj.bias"),
        ("base_model.model.model.layers.12.input_layernorm.weight", "input_layernorm.weight"),
        ("base_model.model.lm_head.modules_to_save.default.weight", "lm_head.weight"),
    ],
)  # fmt: skip
def test_components(name: str, component: str) -> None:
    assert component_of(name) == component
