"""LoRA and DoRA of any make: ranks, subsets of the projections, scales, dropout, dtypes, and what is done meanwhile."""

from __future__ import annotations

import copy
from dataclasses import replace
from itertools import combinations
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from peft import LoraConfig
from torch import nn

from pyralis.models.group_state import LayoutOptions
from pyralis.models.surgery import accelerate, report
from pyralis.ops.dropout_mask import LEVELS
from pyralis.ops.dropout_mask import reference as keep_mask
from tests.models.block_harness import (
    Fused,
    assert_close,
    build,
    decoder,
    make_batch,
    relative_error,
    run_stock,
    specs_of,
    truth_of,
)
from tests.models.test_block import FixedMask, set_dropout
from tests.models.test_lora_options import ALL, EVERY, Pair, logits, same, step, tuned

RANKS = (1, 2, 3, 5, 16, 17, 64, 100, 200, 256)  # the layers have 64 and 128 features
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SUBSETS = [list(chosen) for count in range(1, 8) for chosen in combinations(ALL, count)]


@st.composite
def configs(draw: st.DrawFn) -> LoraConfig:
    """Scales up to 3: with larger ones softmax is so steep that no two ways to add up agree."""
    targets = draw(st.lists(st.sampled_from(ALL), min_size=1, max_size=7, unique=True))
    rslora = draw(st.booleans())
    ranks = {name: draw(st.sampled_from(RANKS)) for name in targets}
    scales = {name: draw(st.sampled_from([0.0, 0.3, 1.0, 3.0])) for name in targets}
    return LoraConfig(
        r=ranks[targets[0]],
        target_modules=targets,
        rank_pattern=ranks,
        alpha_pattern={name: scale * ranks[name] ** (0.5 if rslora else 1.0) for name, scale in scales.items()},
        use_rslora=rslora,
        use_dora=draw(st.booleans()),
        init_lora_weights=False,
    )


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(config=configs(), concatenate=st.booleans(), kind=st.sampled_from(["full", "left", "packed"]))
def test_any_config(config: LoraConfig, concatenate: bool, kind: str) -> None:
    model, batch = build("llama-biases", config), make_batch(kind)
    fused = Fused(model, options=LayoutOptions(concatenate=concatenate))
    assert_close(fused.run(batch), truth_of(model, batch), batch.real)


@pytest.mark.full
@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("targets", SUBSETS, ids="-".join)
def test_every_subset(targets: list[str], dora: bool) -> None:
    model = build("qwen2", LoraConfig(r=5, target_modules=targets, use_dora=dora, init_lora_weights=False))
    batch = make_batch("left")
    assert_close(Fused(model).run(batch), truth_of(model, batch), batch.real)


@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("dropped", [1, LEVELS // 2, LEVELS - 1000, LEVELS - 1])
def test_dropout_from_almost_none_to_almost_all(dropped: int, dora: bool) -> None:
    """dropped: of 65,536 elements on average; what is kept is multiplied by as much, alpha makes up for it."""
    p = dropped / LEVELS
    config = LoraConfig(
        r=4, lora_alpha=8 * (1 - p), target_modules="all-linear", init_lora_weights=False, use_dora=dora
    )
    model = build("llama", config)
    batch = make_batch("full")
    set_dropout(model, p)
    fused = Fused(model, seed=5)
    got, rng = fused.run(batch), fused.weights.rng
    assert rng is not None
    stock = copy.deepcopy(model).double()
    stock.zero_grad()
    for layer, weights in zip(decoder(stock).layers, fused.weights.layers):
        for group in weights.state.groups:
            for index, linear in enumerate(group.linears):
                mask = keep_mask(rng, group.stream + index, batch.layout.tokens, group.group.in_features, dropped)
                layer.get_submodule(linear.path).lora_dropout["default"] = FixedMask(mask, p)
    assert_close(got, run_stock(stock, batch, dtype=torch.float64, specs=fused.specs), batch.real)


@pytest.mark.parametrize(
    ("adapter", "base", "dora"),
    [
        pytest.param(adapter, base, dora, marks=() if base != torch.float16 or not dora else pytest.mark.full)
        for adapter in DTYPES
        for base in DTYPES
        for dora in (False, True)
    ],
)
def test_adapters_of_any_dtype(adapter: torch.dtype, base: torch.dtype, dora: bool) -> None:
    """Gradients come in the adapter's dtype; errors at most 1.5 times stock's, over seeds."""
    squares = torch.zeros(2, 2)
    for seed in range(3):
        config = LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False, use_dora=dora)
        model, batch = build("llama", config, seed=seed).to(base), make_batch("full", seed=seed)
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.data = parameter.data.to(adapter)
        truth, stock = truth_of(model, batch), copy.deepcopy(model)
        with torch.autocast("cpu", base, enabled=base != torch.float32 and adapter == torch.float32):
            theirs = run_stock(stock, batch, dtype=base, specs=specs_of(model))
        ours = Fused(model).run(batch, dtype=base)
        assert {gradient.dtype for gradient in ours.grads.values()} == {adapter}
        for row, found in enumerate((ours, theirs)):
            flat = [torch.cat([r.grads[name].double().flatten() for name in truth.grads]) for r in (found, truth)]
            squares[row] += torch.tensor([relative_error(found.y, truth.y), relative_error(*flat)]).square()
    floor = 1e-12 if base == adapter == torch.float32 else 0.0
    assert (squares[0] <= 1.5**2 * squares[1] + floor).all(), squares.sqrt()


ACTIONS = ("step", "step", "switch", "disable", "merge", "merge safely", "new values")


@pytest.mark.parametrize("base", ["plain", "NF4"])
@settings(max_examples=6, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(dora=st.booleans(), actions=st.lists(st.sampled_from(ACTIONS), min_size=3, max_size=7))
def test_whatever_is_done_between_steps(base: str, dora: bool, actions: list[str]) -> None:
    """Adapters switched, disabled and enabled, merged and unmerged, overwritten: the fast model stays the stock one.

    Merging into 4-bit weights quantises them again, and two roundings may fall apart: nothing is compared after it.
    """
    pair = Pair(base, use_dora=dora)
    optimizers = [torch.optim.SGD([p for n, p in m.named_parameters() if "lora_" in n], 0.05) for m in pair.models]
    for action in actions:
        if action == "step":
            assert set(pair.steps_alike()) == {""}
            for optimizer in optimizers:
                optimizer.step()
        elif action == "switch":
            other = "second" if pair.fast.active_adapter == "default" else "default"
            pair.both(lambda m: m.set_adapter(other))  # noqa: B023
        elif action == "disable":
            pair.both(lambda m: m.base_model.disable_adapter_layers())
            assert set(pair.logits_alike()) == {""}
            pair.both(lambda m: m.base_model.enable_adapter_layers())
        elif action == "new values":
            pair.both(lambda m: [p.data.mul_(0.8) for n, p in m.named_parameters() if "lora_B" in n])
        elif base == "plain":
            pair.both(lambda m: m.merge_adapter(safe_merge=action == "merge safely"))  # noqa: B023
            assert set(pair.logits_alike()) == {""}
            pair.both(lambda m: m.unmerge_adapter())
        assert set(pair.logits_alike()) == {""}


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("dora", [False, True])
def test_embeddings_and_head_trained_over_packed_layers(dora: bool, tied: bool) -> None:
    """Three steps: QLoRA in float32 with both trained whole is stock's to the last sums."""
    options: dict[str, Any] = {"modules_to_save": ["embed_tokens"] if tied else ["embed_tokens", "lm_head"]}
    options |= {"use_dora": dora} | ({"ensure_weight_tying": True} if tied else {})
    model = tuned(options, "NF4")
    stock = copy.deepcopy(model)
    accelerate(model, families=EVERY)
    optimizers = [torch.optim.SGD([p for p in m.parameters() if p.requires_grad], 0.1) for m in (model, stock)]
    for _ in range(3):
        got, want = step(model), step(stock)
        assert any("embed_tokens" in name for name in want[1])
        same(got, want)
        for optimizer in optimizers:
            optimizer.step()
    assert [layer.reason for layer in report(model).layers] == ["", ""]
    torch.testing.assert_close(logits(model), logits(stock), rtol=1e-4, atol=2e-5)


def test_a_replaced_adapter_is_read_anew() -> None:
    """Another module under the same name, of another rank, between two steps."""
    model = build("llama", LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=False))
    batch, fused = make_batch("full"), Fused(model)
    assert_close(fused.run(batch), truth_of(model, batch), batch.real)
    layer = decoder(model).layers[0].self_attn.q_proj
    layer.lora_A["default"], layer.lora_B["default"] = nn.Linear(64, 9, bias=False), nn.Linear(9, 64, bias=False)
    model.zero_grad()
    again = replace(batch, dy=2 * batch.dy)
    assert_close(fused.run(again), truth_of(model, again), batch.real)
