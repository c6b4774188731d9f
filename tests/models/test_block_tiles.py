"""The MLP in tiles of tokens: what the whole computes, every gradient of it, and nothing of it where it cannot run."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch
from peft import LoraConfig
from torch import nn

from pyralis.models import block_tiles
from pyralis.models.checkpointing import choose_save_policy, mlp_tile, plan_save_policy
from pyralis.models.group_state import LayoutOptions
from pyralis.models.policy import RECOMPUTING, SavePolicy
from tests.models.block_harness import (
    ALL,
    DORA,
    FAMILIES,
    Fused,
    Result,
    adapter_layers,
    assert_close,
    build,
    make_batch,
    relative_error,
    scaled,
    truth_of,
)

TILE = 7  # of 25 or 26 tokens: the last one is ragged, and tiles cross the bounds of rows and documents
RANKS = LoraConfig(
    r=8, lora_alpha=8, target_modules="all-linear", init_lora_weights=False, use_rslora=True,
    rank_pattern={"up_proj": 16, "o_proj": 70, "gate_proj": 3}, alpha_pattern={"down_proj": 5},
)  # fmt: skip
SOME = LoraConfig(r=4, target_modules=["q_proj", "up_proj"], init_lora_weights=False)
BIASES = LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False, bias="all", lora_bias=True)


@pytest.fixture
def tiles(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The rows of every tile that a backward goes over."""
    found: list[int] = []
    whole = block_tiles._backward

    def backward(c: Any, kept: Any, x: Any, branch: Any, rows: slice, *rest: Any) -> None:
        found.append(rows.stop - rows.start)
        whole(c, kept, x, branch, rows, *rest)

    monkeypatch.setattr(block_tiles, "_backward", backward)
    return found


def same_bits(a: Result, b: Result) -> bool:
    alike = torch.equal(a.y, b.y) and torch.equal(a.dx, b.dx) and a.grads.keys() == b.grads.keys()
    return alike and all(torch.equal(grad, b.grads[name]) for name, grad in a.grads.items())


@pytest.mark.parametrize("kind", ["left", "packed"])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family(family: str, kind: str, tiles: list[int]) -> None:
    model, batch = build(family), make_batch(kind)
    assert_close(Fused(model).run(batch, "recompute_layer", tile=TILE), truth_of(model, batch), batch.real)
    assert tiles == 2 * [7, 7, 7, batch.layout.tokens - 21]


@pytest.mark.parametrize("concatenate", [True, False])
@pytest.mark.parametrize(
    "lora", [RANKS, SOME, BIASES, DORA, replace(SOME, use_dora=True)],
    ids=["ranks", "subset", "biases", "DoRA", "DoRA subset"],
)  # fmt: skip
@pytest.mark.parametrize("family", ["llama-biases", "gemma2"])
def test_adapters_of_every_shape(family: str, lora: LoraConfig, concatenate: bool) -> None:
    model, batch = build(family, lora), make_batch("full")
    fused = Fused(model, options=LayoutOptions(concatenate=concatenate))
    assert_close(fused.run(batch, "recompute_layer", tile=TILE), truth_of(model, batch), batch.real)


@pytest.mark.parametrize("family", ["llama-biases", "gemma3_text", "phi3", "granite"])
def test_full_fine_tuning(family: str) -> None:
    model, batch = build(family, None), make_batch("packed")
    assert_close(Fused(model).run(batch, "recompute_layer", tile=TILE), truth_of(model, batch), batch.real)


@pytest.mark.parametrize("lora", [ALL, DORA, BIASES, None], ids=["lora", "dora", "biases", "full"])
@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_in_float64_only_the_order_of_sums_differs(family: str, lora: LoraConfig | None) -> None:
    model, batch = build(family, lora).double(), make_batch("full")
    fused = Fused(model)
    whole = fused.run(batch, "recompute_layer", dtype=torch.float64)
    for tile in (1, TILE, 25):
        model.zero_grad()
        got = fused.run(batch, "recompute_layer", dtype=torch.float64, tile=tile)
        assert_close(got, whole, batch.real, output=1e-14, gradient=1e-13)


def test_a_wrong_gradient_does_not_pass() -> None:
    model, batch = build("gemma2"), make_batch("right")
    truth, got = truth_of(model, batch), Fused(model).run(batch, "recompute_layer", tile=TILE)
    for name in truth.grads:
        with pytest.raises(AssertionError):
            assert_close(scaled(got, name, 1.01), truth, batch.real)


@pytest.mark.parametrize("lora", [ALL, DORA, None], ids=["lora", "dora", "full"])
def test_runs_and_policies_yield_the_same_bits(lora: LoraConfig | None) -> None:
    model, batch = build("gemma2", lora), make_batch("left")
    fused, results = Fused(model), []
    for policy in (*RECOMPUTING, *RECOMPUTING):
        model.zero_grad()
        results.append(fused.run(batch, policy, tile=TILE))
    assert all(same_bits(results[0], other) for other in results[1:])


def test_a_tile_that_holds_all_is_the_whole(tiles: list[int]) -> None:
    model, batch = build("llama"), make_batch("full")
    fused = Fused(model)
    whole = fused.run(batch, "recompute_layer")
    model.zero_grad()
    assert same_bits(whole, fused.run(batch, "recompute_layer", tile=batch.layout.tokens))
    assert not tiles


@pytest.mark.parametrize("policy", ["keep", "recompute_cheap"])
def test_what_is_kept_whole_is_computed_whole(policy: SavePolicy, tiles: list[int]) -> None:
    model, batch = build("llama"), make_batch("full")
    fused = Fused(model)
    whole = fused.run(batch, policy)
    model.zero_grad()
    assert same_bits(whole, fused.run(batch, policy, tile=TILE))
    assert not tiles


@pytest.mark.parametrize(("which", "expected"), [("q_proj", 8), ("up_proj", 0), ("down_proj", 0)])
def test_dropout_in_the_mlp_keeps_it_whole(which: str, expected: int, tiles: list[int]) -> None:
    """Masks count rows from the first of a call; those of attention are drawn whole in any case."""
    model, batch = build("llama"), make_batch("packed")
    for name, module in adapter_layers(model):
        if which in name:
            module.lora_dropout["default"] = nn.Dropout(0.25)
    fused = Fused(model.train(), seed=3)
    fused.weights.refresh()
    whole = fused.run(batch, "recompute_layer", refresh=False)
    model.zero_grad()
    got = fused.run(batch, "recompute_layer", refresh=False, tile=TILE)
    assert len(tiles) == expected
    assert_close(got, whole, batch.real)
    assert expected or same_bits(got, whole)


def test_micro_steps_add_up() -> None:
    model, first, second = build("llama-biases", BIASES), make_batch("full"), make_batch("full", seed=1)
    truths = [truth_of(model, batch) for batch in (first, second)]
    fused = Fused(model)
    fused.run(first, "recompute_layer", tile=TILE)
    both = fused.run(second, "recompute_layer", tile=TILE)
    for name, grad in both.grads.items():
        assert relative_error(grad, truths[0].grads[name] + truths[1].grads[name]) <= 1e-5, name


@pytest.mark.parametrize("lora", [ALL, DORA, BIASES, None], ids=["lora", "dora", "biases", "full"])
@pytest.mark.parametrize("family", ["llama-biases", "gemma2"])
def test_narrow_gradients_are_rounded_once(family: str, lora: LoraConfig | None) -> None:
    """All parameters in bfloat16, a tile a token: sums in their dtype would lose what float32 holds."""
    total = {"whole": 0.0, "tiles": 0.0}
    for seed in range(3):
        model, batch = build(family, lora, seed=seed).bfloat16(), make_batch("full", seed=seed)
        truth = truth_of(model, batch)
        for kind, tile in (("whole", None), ("tiles", 1)):
            model.zero_grad()
            got = Fused(copy.deepcopy(model)).run(batch, "recompute_layer", dtype=torch.bfloat16, tile=tile)
            assert all(grad.dtype == torch.bfloat16 for grad in got.grads.values())
            total[kind] += sum(
                relative_error(got.grads[name], grad) ** 2 for name, grad in truth.grads.items() if "mlp" in name
            )
    assert total["tiles"] <= 1.05 * total["whole"]


def test_narrow_gradients_are_added_to_what_is_there() -> None:
    model, batch = build("llama", None).bfloat16(), make_batch("full")
    fused = Fused(model)
    once = fused.run(batch, "recompute_layer", dtype=torch.bfloat16, tile=TILE)
    twice = fused.run(batch, "recompute_layer", dtype=torch.bfloat16, tile=TILE)
    for name, grad in once.grads.items():
        assert relative_error(twice.grads[name], 2 * grad.float()) <= 2**-8, name


def test_a_float32_residual_stream_over_a_bfloat16_base() -> None:
    model, batch = build("granite").bfloat16(), make_batch("full")
    whole = Fused(model).run(batch, "recompute_layer", dtype=torch.float32)
    model.zero_grad()
    got = Fused(model).run(batch, "recompute_layer", dtype=torch.float32, tile=TILE)
    truth = truth_of(model, batch)
    for name, grad in {"dx": got.dx, **got.grads}.items():
        wanted = {"dx": truth.dx, **truth.grads}[name]
        assert relative_error(grad, wanted) <= 1.1 * relative_error({"dx": whole.dx, **whole.grads}[name], wanted)


def test_the_choice_of_a_tile() -> None:
    layer = nn.Identity()
    choose_save_policy([layer], "recompute_layer", 512)
    assert mlp_tile(layer) == 512
    plan_save_policy(layer, "offload_input")
    assert mlp_tile(layer) is None, "the plan is above what was chosen"
    plan_save_policy(layer, "offload_input", 64)
    assert mlp_tile(layer) == 64
    plan_save_policy(layer, None)
    assert mlp_tile(layer) == 512
    choose_save_policy([layer], None)
    assert mlp_tile(layer) is None
    with pytest.raises(ValueError, match="tile of the MLP is 0 tokens"):
        choose_save_policy([layer], "recompute_layer", 0)
