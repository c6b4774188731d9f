"""The fused block against stock transformers and PEFT, layer after layer, in float32 against stock's float64."""

from __future__ import annotations

import copy
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
import torch
from peft import LoraConfig
from torch import Tensor, nn

from pyralis.models.block import fused_layer
from pyralis.models.group_state import LayoutOptions
from pyralis.models.policy import POLICIES, SavePolicy
from pyralis.ops.dropout_mask import reference as keep_mask
from tests.models.block_harness import (
    ALL,
    DORA,
    FAMILIES,
    Batch,
    Fused,
    Result,
    adapter_layers,
    assert_close,
    build,
    decoder,
    make_batch,
    relative_error,
    run_stock,
    scaled,
    specs_of,
    truth_of,
)

KINDS = ("right", "left", "packed")
QV = LoraConfig(r=4, target_modules=["q_proj", "v_proj", "down_proj"], init_lora_weights=False)
RANKS = LoraConfig(
    r=8, lora_alpha=8, target_modules="all-linear", init_lora_weights=False, use_rslora=True,
    rank_pattern={"k_proj": 3, "up_proj": 16, "o_proj": 70}, alpha_pattern={"v_proj": 5},
)  # fmt: skip
DORA_QV, DORA_RANKS = (replace(config, use_dora=True) for config in (QV, RANKS))
LAST = LoraConfig(r=4, target_modules=["k_proj", "gate_proj"], init_lora_weights=False, layers_to_transform=[1])
BIASES = LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False, bias="all", lora_bias=True)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family(family: str, kind: str) -> None:
    model, batch = build(family), make_batch(kind)
    assert_close(Fused(model).run(batch), truth_of(model, batch), batch.real)


@pytest.mark.parametrize("concatenate", [True, False])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_with_dora(family: str, concatenate: bool) -> None:
    model, batch = build(family, DORA), make_batch("left")
    truth = truth_of(model, batch)
    assert any(name.endswith("lora_magnitude_vector.default.weight") for name in truth.grads)
    fused = Fused(model, options=LayoutOptions(concatenate=concatenate))
    assert_close(fused.run(batch), truth, batch.real)


@pytest.mark.parametrize("concatenate", [True, False])
@pytest.mark.parametrize(
    "lora", [QV, RANKS, LAST, DORA_QV, DORA_RANKS], ids=["subset", "ranks", "last layer", "DoRA subset", "DoRA ranks"]
)
def test_adapters_of_every_shape(lora: LoraConfig, concatenate: bool) -> None:
    model, batch = build("qwen2", lora), make_batch("full")
    fused = Fused(model, options=LayoutOptions(concatenate=concatenate))
    assert_close(fused.run(batch), truth_of(model, batch), batch.real)


@pytest.mark.parametrize("lora", [BIASES, replace(BIASES, lora_bias=False, use_dora=True)], ids=["LoRA", "DoRA"])
@pytest.mark.parametrize("family", ["qwen2", "llama-biases"])
def test_trained_biases(family: str, lora: LoraConfig) -> None:
    model, batch = build(family, lora), make_batch("full")
    for name, parameter in model.named_parameters():
        if name.endswith("lora_B.default.bias"):
            nn.init.normal_(parameter, std=0.1)
    truth = truth_of(model, batch)
    assert any(name.endswith("k_proj.base_layer.bias") for name in truth.grads)
    assert_close(Fused(model).run(batch), truth, batch.real)


@pytest.mark.parametrize("family", FAMILIES)
def test_full_fine_tuning(family: str) -> None:
    model, batch = build(family, None), make_batch("packed")
    truth = truth_of(model, batch)
    assert len(truth.grads) == sum(1 for _ in decoder(model).layers.parameters())
    assert_close(Fused(model).run(batch), truth, batch.real)


@pytest.mark.parametrize(
    ("lora", "dropout"), [(ALL, 0.2), (DORA, 0.0), (DORA, 0.2), (None, 0.0)],
    ids=["lora", "dora", "dora with dropout", "full"],
)  # fmt: skip
@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma2", "gemma3_text", "granite", "phi3"])
def test_policies_yield_the_same_bits(family: str, lora: LoraConfig | None, dropout: float) -> None:
    model, batch = build(family, lora), make_batch("left")
    if dropout:
        set_dropout(model, dropout)
    fused = Fused(model)
    fused.weights.refresh()
    results = []
    for policy in POLICIES:
        model.zero_grad()
        results.append(fused.run(batch, policy, refresh=False))
    for other in results[1:]:
        assert torch.equal(results[0].y, other.y)
        assert torch.equal(results[0].dx, other.dx)
        assert all(torch.equal(grad, other.grads[name]) for name, grad in results[0].grads.items())


@pytest.mark.parametrize("lora", [ALL, DORA], ids=["lora", "dora"])
def test_a_wrong_gradient_does_not_pass(lora: LoraConfig) -> None:
    model, batch = build("gemma2", lora), make_batch("right")
    truth, got = truth_of(model, batch), Fused(model).run(batch)
    for name in truth.grads:
        with pytest.raises(AssertionError):
            assert_close(scaled(got, name, 1.01), truth, batch.real)


def set_dropout(model: Any, p: float) -> None:
    for _, module in adapter_layers(model):
        module.lora_dropout["default"] = nn.Dropout(p)
    model.train()


class FixedMask(nn.Module):
    def __init__(self, mask: Tensor, p: float) -> None:
        super().__init__()
        self.mask, self.p = mask, p

    def forward(self, x: Tensor) -> Tensor:
        return torch.where(self.mask.view(x.shape), x, 0) / (1 - self.p)


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize(
    ("family", "lora"),
    [("llama", ALL), ("phi3", ALL), ("gemma3_text", ALL), ("llama-biases", DORA_QV), ("phi3", DORA), ("qwen3", DORA)],
)
def test_dropout_is_peft_s_with_these_masks(family: str, policy: SavePolicy, lora: LoraConfig) -> None:
    p = 0.25  # a multiple of 2^-16: the rate is met exactly
    model, batch = build(family, lora), make_batch("packed")
    set_dropout(model, p)
    fused = Fused(model, seed=7)
    got = fused.run(batch, policy)
    rng = fused.weights.rng
    assert rng is not None
    stock = copy.deepcopy(model).double()
    stock.zero_grad()
    drawn = []
    for layer, weights in zip(decoder(stock).layers, fused.weights.layers):
        for group in weights.state.groups:
            for index, linear in enumerate(linear for linear in group.linears if linear.adapter is not None):
                mask = keep_mask(rng, group.stream + index, batch.layout.tokens, group.group.in_features, 1 << 14)
                layer.get_submodule(linear.path).lora_dropout["default"] = FixedMask(mask, p)
                drawn.append(mask)
    assert not any(torch.equal(a, b) for a, b in pairwise(drawn) if a.shape == b.shape)
    truth = run_stock(stock, batch, dtype=torch.float64, specs=fused.specs)
    assert_close(got, truth, batch.real)
    fused.weights.refresh()
    assert fused.weights.rng is not None
    assert not torch.equal(rng, fused.weights.rng), "each forward draws its own"


def test_eval_mode_has_no_dropout() -> None:
    model, batch = build("llama"), make_batch("full")
    set_dropout(model, 0.5)
    fused = Fused(model.eval())
    assert_close(fused.run(batch), truth_of(model, batch), batch.real)
    assert fused.weights.rng is None


def test_the_node_takes_parameters_only_where_autograd_has_to_know_of_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """DDP's hooks run when autograd passes the parameters; nothing else needs that, and it costs time."""
    model, batch = build("llama"), make_batch("full")
    fused, trained = Fused(model), sum(p.requires_grad for p in decoder(model).layers[1].parameters())

    def inputs(x: Tensor) -> list[int]:
        node, found = fused.forward(x, batch).grad_fn, []
        while node is not None and "FusedLayer" in node.name():
            found.append(sum(edge is not None for edge, _ in node.next_functions))
            node = node.next_functions[0][0]
        return found

    x = batch.x.clone()
    assert inputs(x) == [1, trained]
    assert inputs(x.requires_grad_()) == [1, 1]
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    assert inputs(x) == [1 + trained, 1 + trained]


def test_micro_steps_add_up_and_zero_grad_starts_anew() -> None:
    model, first, second = build("llama"), make_batch("full"), make_batch("full", seed=1)
    truths = [truth_of(model, batch) for batch in (first, second)]
    fused = Fused(model)
    fused.run(first)
    both = fused.run(second)
    for name, grad in both.grads.items():
        assert relative_error(grad, truths[0].grads[name] + truths[1].grads[name]) <= 1e-5, name
    views = {name: p.grad.data_ptr() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    assert_close(fused.run(second), truths[1], second.real)
    assert views == {name: p.grad.data_ptr() for name, p in model.named_parameters() if p.grad is not None}


def test_gradients_that_others_hold_are_added_to() -> None:
    """Some parameters have a gradient of the user's, some none: one accumulation flag must not serve both."""
    model, batch = build("llama"), make_batch("full")
    truth = truth_of(model, batch)
    chosen = {n: p for n, p in model.named_parameters() if "q_proj.lora_A" in n or "up_proj.lora_B" in n}
    for parameter in chosen.values():
        parameter.grad = torch.ones_like(parameter)
    got = Fused(model).run(batch)
    for name, grad in truth.grads.items():
        assert relative_error(got.grads[name], grad + (name in chosen)) <= 1e-5, name


def test_frozen_input_and_no_grad() -> None:
    model, batch = build("qwen3"), make_batch("full")
    fused, truth = Fused(model), truth_of(model, batch)
    y = fused.forward(batch.x.float(), batch)
    y.backward(batch.dy.float())
    for name, parameter in model.named_parameters():
        if name in truth.grads:
            assert relative_error(parameter.grad, truth.grads[name]) <= 1e-5
    with torch.no_grad():
        assert torch.equal(fused.forward(batch.x.float(), batch), y)
    model.requires_grad_(False)
    assert not fused.forward(batch.x.float(), batch).requires_grad


def test_no_adapter_at_all() -> None:
    model, batch = build("gemma", None), make_batch("right")
    model.requires_grad_(False)
    assert_close(Fused(model).run(batch), truth_of(model, batch), batch.real)


def test_a_second_backward_is_refused() -> None:
    model, batch = build("llama"), make_batch("full")
    y = Fused(model).forward(batch.x.float(), batch)
    y.sum().backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="second time"):
        y.sum().backward()


class Shelf:
    """An InputStore that counts."""

    def __init__(self) -> None:
        self.held: dict[int, Tensor] = {}
        self.settled = 0

    def settle(self) -> None:
        self.settled += 1
        assert self.settled == len(self.held), "after each put"

    def put(self, tensor: Tensor) -> int:
        self.held[len(self.held)] = tensor.clone()
        return len(self.held) - 1

    def get(self, handle: Any) -> Tensor:
        return self.held.pop(handle)


def test_inputs_in_a_store() -> None:
    model, batch, shelf = build("gemma3_text"), make_batch("full"), Shelf()
    fused = Fused(model)
    x = batch.x.float().requires_grad_()
    y = fused.forward(x, batch, "offload_input", store=shelf)
    assert len(shelf.held) == shelf.settled == 2
    y.backward(batch.dy.float())
    assert not shelf.held
    assert relative_error(x.grad, truth_of(model, batch).dx) <= 1e-5  # type: ignore[arg-type]


def stock_errors(model: Any, batch: Batch, truth: Result, dtype: torch.dtype) -> dict[str, float]:
    stock = copy.deepcopy(model)
    stock.zero_grad()
    return errors(run_stock(stock, batch, dtype=dtype, specs=specs_of(model)), truth)


def errors(got: Result, want: Result) -> dict[str, float]:
    found = {name: relative_error(got.grads[name], grad) for name, grad in want.grads.items()}
    return {"y": relative_error(got.y, want.y), "dx": relative_error(got.dx, want.dx), **found}


@pytest.mark.parametrize("lora", [ALL, DORA], ids=["lora", "dora"])
@pytest.mark.parametrize("family", ["llama", "qwen2", "gemma2", "phi3", "granite"])
def test_bfloat16_errs_no_more_than_stock(family: str, lora: LoraConfig) -> None:
    ours: dict[str, float] = {}
    theirs: dict[str, float] = {}
    for seed in range(4):
        model, batch = build(family, lora, seed=seed).bfloat16(), make_batch("full", seed=seed)
        truth = truth_of(model, batch)
        for total, found in (
            (ours, errors(Fused(model).run(batch, dtype=torch.bfloat16), truth)),
            (theirs, stock_errors(model, batch, truth, torch.bfloat16)),
        ):
            for name, error in found.items():
                total[name] = total.get(name, 0.0) + error**2
    for name, error in theirs.items():
        assert ours[name] <= 1.5**2 * error, f"{name}: {ours[name] ** 0.5} against {error**0.5}"


def test_float32_masters_over_a_bfloat16_base() -> None:
    """Gradients come out in float32, and closer to the truth than bfloat16 can hold them."""
    model, batch = build("llama").bfloat16(), make_batch("full")
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = parameter.data.float()
    got = Fused(model).run(batch, dtype=torch.bfloat16)
    assert {grad.dtype for grad in got.grads.values()} == {torch.float32}
    assert max(errors(got, truth_of(model, batch)).values()) < 0.02


def test_a_float32_residual_stream_over_a_bfloat16_base() -> None:
    model, batch = build("granite").bfloat16(), make_batch("full")
    wide = errors(Fused(model).run(batch, dtype=torch.float32), truth_of(model, batch))
    model.zero_grad()
    narrow = errors(Fused(model).run(batch, dtype=torch.bfloat16), truth_of(model, batch))
    assert wide["y"] < narrow["y"]
    assert wide["dx"] < narrow["dx"]


def test_autocast_that_is_not_heeded_changes_nothing() -> None:
    model, batch = build("llama"), make_batch("full")
    fused = Fused(model)
    plain = fused.run(batch)
    model.zero_grad()
    with torch.autocast("cpu", torch.bfloat16):
        x = batch.x.float().requires_grad_()
        y = fused.forward(x, batch)
    y.backward(batch.dy.float())
    assert torch.equal(plain.y, y)
    assert torch.equal(plain.dx, x.grad)  # type: ignore[arg-type]


@pytest.mark.parametrize("resident", [False, True])
@pytest.mark.parametrize("lora", [ALL, DORA, None], ids=["lora", "dora", "full"])
@pytest.mark.parametrize("family", ["llama-biases", "qwen3", "gemma2", "phi3"])
def test_float32_masters_under_autocast(family: str, lora: LoraConfig | None, resident: bool) -> None:
    """All weights and the residual stream in float32, products in bfloat16; twice, with an update in between."""
    model, batch = build(family, lora), make_batch("full")
    fused = Fused(model, options=LayoutOptions(concatenate=True, resident=resident))
    fused.autocast = torch.bfloat16
    for _ in range(2):
        truth = truth_of(model, batch)
        model.zero_grad()
        ours = errors(fused.run(batch), truth)
        stock = copy.deepcopy(model)
        stock.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            theirs = errors(run_stock(stock, batch, dtype=torch.float32, specs=fused.specs), truth)
        total, limit = (sum(e**2 for e in found.values()) ** 0.5 for found in (ours, theirs))
        assert total <= 1.5 * limit
        assert ours["y"] <= 1.5 * theirs["y"]
        assert ours["dx"] <= 1.5 * theirs["dx"]
        with torch.no_grad():
            for parameter in decoder(model).layers.parameters():
                parameter.mul_(0.9)
    assert all(p.grad is None or p.grad.dtype == torch.float32 for p in model.parameters())


def test_the_gradient_of_a_sum() -> None:
    """Its strides are all 0."""
    model, batch = build("llama"), make_batch("full")
    fused, ones = Fused(model), replace(batch, dy=torch.ones_like(batch.dy))
    x = batch.x.float().requires_grad_()
    fused.forward(x, batch).sum().backward()
    assert relative_error(x.grad, truth_of(model, ones).dx) <= 1e-5  # type: ignore[arg-type]


def test_one_table_of_angles_serves_all_rows() -> None:
    model, batch = build("llama"), make_batch("full")
    fused = Fused(model)
    y = fused.forward(batch.x.float(), batch)
    cos, sin = decoder(model).rotary_emb(batch.x.float(), batch.positions[:1])
    first, second = fused.weights.layers
    half = fused_layer(batch.x.float(), cos, sin, batch.layout, first)
    assert torch.equal(fused_layer(half, cos, sin, batch.layout, second), y)
